"""Everything about the package stands in settings.ini; this file only hands it to setuptools."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
readme = here / "README.md"

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    keywords=settings["keywords"].split(),
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license={"apache2": "Apache-2.0"}[settings["license"]],
    classifiers=[
        f"Intended Audience :: {settings['audience']}",
        f"Natural Language :: {settings['language']}",
        f"Programming Language :: Python :: {settings['min_python']}",
    ],
    packages=[settings["lib_path"]],
    package_data={settings["lib_path"]: ["data/*/*"]},
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require={extra: settings[f"{extra}_requirements"].split() for extra in ("dev", "workshop", "ray")},
    entry_points={"console_scripts": settings["console_scripts"].split()},
)
