"""Fixtures for all tests: the default model, tiny random models of several families, and processes that start at once."""
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import time
from functools import lru_cache

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tokenlabel.lm import LM, load_lm
from tokenlabel.store import default_folder

# A shell that runs the tests in the background has Ctrl-C ignored, here and in all that is started from here.
signal.signal(signal.SIGINT, signal.default_int_handler)

def pytest_configure(config): config.addinivalue_line("markers", "slow: takes the default model, a kernel or minutes; not in `make check`")


# Files of tests that start processes, threads or kernels, or search for a long time.
SLOW = ("test_checkpoints", "test_cli", "test_compare", "test_exhaustive", "test_fuzz", "test_many", "test_notebooks",
        "test_store", "test_widgets", "test_workers", "test_workshop")


def pytest_collection_modifyitems(items):
    """Whatever takes the default model, or one more architecture, is slow.

    What is slow comes first, or one process is left with it at the end."""
    others = {"default", *FAMILIES} - {"llama", "gpt2", "gemma3"}
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs
        names = set(item.name.strip("]").replace("[", "-").split("-"))
        if (item.path.stem in SLOW or others & names or "tiny_folder" in fixtures
                or "lm" in fixtures and fixtures["lm"][-1].baseid == "tests"): item.add_marker("slow")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


# Importing these takes longer than many a test does. The fork server does it once, and nothing else: a process that has
# computed cannot be forked safely.
LIBRARIES = ["torch", "transformers", "transformers.generation", "transformers.models.auto.modeling_auto",
             "transformers.models.llama.modeling_llama", "pandas", "pyarrow.parquet", "matplotlib.pyplot", "scipy.stats",
             "ipykernel.kernelapp", "ipywidgets", "papermill", "nbdev.test"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(LIBRARIES)


class Forked:
    "A process of the fork server that calls a function, used as one of `subprocess`."
    stdin = stdout = stderr = None

    def __init__(self, function, *args, environment=None):
        self.process = FORKS.Process(target=_begin, args=(function, args, dict(environment or os.environ)))
        self.process.start()
        self.pid = self.process.pid
        while self.poll() is None and os.getpgid(self.pid) != self.pid: time.sleep(.001)  # a group is what a signal goes to

    def poll(self): return self.process.exitcode

    def wait(self):
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)

    def terminate(self): self.send_signal(signal.SIGTERM)

    def kill(self): self.send_signal(signal.SIGKILL)


def _begin(function, args, environment):
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    function(*args)


def _fork_python(command, *, stdin, env, **_):
    return Forked(_run_code, multiprocessing.connection.Connection(os.dup(stdin)), command[-1], environment=env)


def _run_code(connection, code):
    os.dup2(connection.fileno(), 0)
    exec(code)


def _fork_kernel(command, *, cwd=None, env=None, **_):
    return Forked(_be_kernel, command[command.index("-f"):], cwd or os.getcwd(), environment=env)


def _be_kernel(arguments, cwd):
    from ipykernel.kernelapp import launch_new_instance
    os.chdir(cwd)
    launch_new_instance(argv=arguments)


@pytest.fixture
def quick_starts(monkeypatch):
    "Workers and kernels come from the fork server, in which PyTorch is imported. (Elsewhere they start as they do for users.)"
    multiprocessing.forkserver.ensure_running()
    monkeypatch.setattr("tokenlabel.workers.Popen", _fork_python)
    monkeypatch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", _fork_kernel)


FAMILIES = ("llama", "gpt2", "qwen2", "gemma", "gemma3", "gpt_neox", "phi", "opt")

TOKENIZER_SIZE = 300  # special tokens + 256 bytes + a few merges
MODEL_SIZE = 320  # the models' vocabularies are padded beyond the tokenizer's

TEXT = """the cat and the dog are animals, and the horse is an animal too. The house, the car and the red
book are things. Examples of animals: cat, dog, horse. Text about animals: the cat sat on the mat."""


def tiny_tokenizer(bos: bool) -> transformers.PreTrainedTokenizerFast:
    "A byte-level BPE tokenizer with 300 tokens; puts <bos> in front of its input if `bos`."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    assert tokenizer.get_vocab_size() == TOKENIZER_SIZE
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def tiny_config(family: str) -> transformers.PretrainedConfig:
    "Two layers of width 32. The spread of the weights is large enough for outputs to differ visibly."
    common = dict(vocab_size=MODEL_SIZE, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=256, initializer_range=0.2)
    grouped = dict(num_key_value_heads=2, head_dim=8)
    match family:
        case "llama":
            return transformers.LlamaConfig(**common, **sizes, **grouped)
        case "gpt2":
            return transformers.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=256,
                                           initializer_range=0.2)
        case "qwen2":
            return transformers.Qwen2Config(**common, **sizes, num_key_value_heads=2, tie_word_embeddings=True)
        case "gemma":
            return transformers.GemmaConfig(**common, **sizes, **grouped)
        case "gemma3":
            return transformers.Gemma3TextConfig(
                **common, **sizes, **grouped, sliding_window=128, query_pre_attn_scalar=8,
                layer_types=["sliding_attention", "full_attention"], final_logit_softcapping=20.0,
            )
        case "gpt_neox":
            return transformers.GPTNeoXConfig(**common, **sizes)
        case "phi":
            return transformers.PhiConfig(**common, **sizes)
        case "opt":  # embeddings narrower than the layers
            return transformers.OPTConfig(
                **common, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=256, init_std=0.2, do_layer_norm_before=True,
            )
    raise ValueError(f"no tiny model of family {family!r}; there is {', '.join(FAMILIES)}")


def tiny_model(family: str, seed: int = 0) -> transformers.PreTrainedModel:
    with torch.random.fork_rng(devices=[]):  # models are initialised from the global generator
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)


@lru_cache
def make_tiny_lm(family: str, seed: int = 0) -> LM:
    "A random model of one of FAMILIES; llama, gemma, gemma3 and opt start their input with <bos>."
    bos = family in ("llama", "gemma", "gemma3", "opt")
    return load_lm(tiny_model(family, seed), tokenizer=tiny_tokenizer(bos))


@pytest.fixture(scope="session")
def tiny_lm():
    "`tiny_lm(family, seed=0)`: a random model of one of FAMILIES."
    return make_tiny_lm


@pytest.fixture(scope="session")
def lm() -> LM:
    "The default model; the first time ever, it is downloaded and converted."
    return load_lm()


@pytest.fixture(scope="session")
def stored(tiny_lm, tmp_path_factory) -> LM:
    "The tiny llama, loaded from a folder: other processes can load the same model."
    folder = tmp_path_factory.mktemp("stored") / "tiny"
    for part in tiny_lm("llama").model, tiny_lm("llama").tokenizer: part.save_pretrained(folder)
    return load_lm(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> str:
    "The folder of a tiny random model with the tokenizer of the default one: its labels are noise, and take seconds."
    tiny = tmp_path_factory.mktemp("model")
    config = transformers.AutoConfig.from_pretrained(
        default_folder(), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tiny)
    transformers.AutoTokenizer.from_pretrained(default_folder()).save_pretrained(tiny)
    return str(tiny)
