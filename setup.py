"Everything here is read from settings.ini: edit that, not this."
import configparser, pathlib, shlex
import setuptools

here = pathlib.Path(__file__).parent
ini = configparser.ConfigParser(delimiters=["="])
ini.read(here/"settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
lib = cfg["lib_path"]
studies = f"{lib}.studies"   # the study files live in nbs/studies and travel in the wheel as package data
lite0 = shlex.split(cfg["lite0_requirements"])

setuptools.setup(
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    long_description=(here/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=[*setuptools.find_packages(include=[lib, lib + ".*"]), studies],
    package_dir={studies: "nbs/studies"},
    package_data={lib: ["*.csv", "*.safetensors"], studies: ["*.yaml", "*.ipynb", "*.py"]},
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={"lite0": lite0, "dev": lite0 + shlex.split(cfg["dev_requirements"])},
    entry_points={
        "nbdev": [f"{lib}={lib}._modidx:d"],
        "console_scripts": shlex.split(cfg["console_scripts"]),
    },
)
