"""Everything about the package stands in settings.ini; this file hands it to setuptools, and makes the wheel whole."""
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
pages = f"{settings['git_url']}/blob/{settings['branch']}"


class BuildWhole(build_py):
    "Also puts what the commands need of nbs/ and figures/ into the package. (An editable install finds it beside the package.)"
    def run(self):
        super().run()
        if self.editable_mode: return
        for path in (path for pattern in settings["bundled"].split() for path in here.glob(pattern)):
            target = Path(self.build_lib, settings["lib_path"], path.relative_to(here))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def description() -> str:
    "README.md with absolute links: where a package index shows the page, no files lie beside it."
    links = re.compile(r'(\]\(|(?:src|href)=")(?!\w+:|#)([^)"\s]+)')
    pictures = pages.replace("https://github.com", "https://raw.githubusercontent.com").replace("/blob/", "/")
    def absolute(link): return f"{link[1]}{pictures if link[2].endswith(('.png', '.svg')) else pages}/{link[2]}"
    readme = here / "README.md"  # is made with what is installed, so it may not be there yet
    return links.sub(absolute, readme.read_text(encoding="utf-8")) if readme.exists() else ""


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=description(),
    long_description_content_type="text/markdown",
    keywords=settings["keywords"].split(),
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    project_urls={"Documentation": f"{pages}/nbs/docs/index.md", "Changelog": f"{pages}/CHANGELOG.md",
                  "Paper": "https://arxiv.org/abs/2504.00754"},
    license={"apache2": "Apache-2.0"}[settings["license"]],
    classifiers=[
        f"Intended Audience :: {settings['audience']}",
        f"Natural Language :: {settings['language']}",
        *(f"Programming Language :: Python :: {version}" for version in settings["pythons"].split()),
    ],
    packages=[settings["lib_path"]],
    package_data={settings["lib_path"]: ["data/*/*"]},
    cmdclass={"build_py": BuildWhole},
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require={extra: settings[f"{extra}_requirements"].split() for extra in ("dev", "workshop", "ray")},
    entry_points={"console_scripts": settings["console_scripts"].split()},
)
