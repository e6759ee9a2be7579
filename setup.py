# Only what pyproject.toml cannot say: the folder `kernels/`, with whatever subpackages it has, is
# installed as `tokenpack.kernels`. Everything else is there.
from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["tokenpack", "tokenpack.*"]),
        "tokenpack.kernels",
        *(f"tokenpack.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"tokenpack.kernels": "kernels"},
    package_data={"tokenpack": ["py.typed"], "tokenpack.kernels": ["py.typed"]},
)
