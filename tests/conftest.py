"""Settings of all tests: no time limits for Hypothesis, and less time for the rest.

Garbage collections and Triton's interpreter take most of the time that is saved here.
"""

import dataclasses
import functools
import gc
import re
from importlib.util import find_spec

import pytest

from tokenpack.kernels._triton import INTERPRETED

if find_spec("hypothesis"):  # not on every machine that runs the tests for GPUs
    from hypothesis import settings

    # A busy machine is no fault of the code.
    settings.register_profile("tokenpack", deadline=None)
    settings.load_profile("tokenpack")


# The machine that runs the tests for GPUs has no `datasets`. There, a file that imports it is
# skipped (the error of one file would stop the whole run), and so are these, whose tests need it.
HAS_DATASETS = find_spec("datasets") is not None
NEED_DATASETS = ["commands/test_preview.py", "data/chat/test_example.py", "test_public_api.py"]
collect_ignore = [] if HAS_DATASETS else NEED_DATASETS


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Skip a file that cannot be imported for want of `datasets`."""
    report = yield
    lacks = re.search("No module named 'datasets'|needs datasets", str(report.longrepr))
    if report.failed and lacks and not HAS_DATASETS:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, "Skipped: datasets is not installed")
    return report


def pytest_terminal_summary(terminalreporter):
    """Name what was not collected."""
    if collect_ignore:
        terminalreporter.line(f"not run without datasets: {', '.join(collect_ignore)}")


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage():
    """Exclude imported modules from garbage collections.

    `Trainer.train` collects garbage. With PyTorch and transformers imported, this takes 0.5 s, more
    than the training steps of a test.
    """
    gc.collect()
    gc.freeze()


def search_each_module_once_per_launch():
    """Skip searches of triton.language that a launch has already made.

    The interpreter replaces the builtins of triton.language when a kernel starts. It searches the
    modules for builtins again at every call of another ``@triton.jit`` function, and finds them
    replaced. Those searches take about half of the time of a kernel that calls helpers.
    """
    from triton.runtime import interpreter

    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    searched = set()  # the global namespaces of functions that this launch has called

    def patch_lang_once(function):
        namespace = id(function.__globals__)
        if namespace in searched:
            return interpreter._LangPatchScope()
        searched.add(namespace)
        return patch_lang(function)

    @functools.wraps(launch)
    def launch_with_nothing_searched(*args, **kwargs):
        searched.clear()
        return launch(*args, **kwargs)

    interpreter._patch_lang = patch_lang_once
    interpreter.GridExecutor.__call__ = launch_with_nothing_searched


def skip_overflow_checks():
    """Do not compute whether an integer overflows.

    The interpreter computes each sum, difference and product of 32-bit integers again in 64 bits,
    to assert that it fits. It skips the assertion itself outside of debug mode. This takes half of
    the remaining time.
    """
    from triton.runtime.interpreter import interpreter_builder as builder

    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def find_each_numpy_dtype_once():
    """Cache the NumPy dtype of a Triton dtype. The interpreter builds a table at each call."""
    from triton.runtime import interpreter

    get_np_dtype, found = interpreter._get_np_dtype, {}

    def get_np_dtype_once(dtype):
        name = dtype.scalar.name  # dtypes of blocks and pointers cannot be hashed
        if name not in found:
            found[name] = get_np_dtype(dtype)
        return found[name]

    interpreter._get_np_dtype = get_np_dtype_once


def build_each_shape_once():
    """Share shapes among tensors and types.

    Triton builds a shape anew for each tensor and each type of one, out of objects that themselves
    have a type. Nothing changes a shape after that.
    """
    from triton.language import core

    init_block_type, init_tensor = core.block_type.__init__, core.tensor.__init__
    of_types, of_tensors = {}, {}

    def init_block_type_once(self, element_ty, shape):
        sizes = tuple([getattr(size, "value", size) for size in shape])
        if sizes not in of_types:
            init_block_type(self, element_ty, shape)
            of_types[sizes] = self.shape, self.numel
        self.element_ty = element_ty
        self.shape, self.numel = of_types[sizes]
        self.name = f"<{sizes}, {element_ty}>"

    def init_tensor_once(self, handle, type):
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in of_tensors:
            init_tensor(self, handle, type)
            of_tensors[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensors[sizes]

    core.block_type.__init__, core.tensor.__init__ = init_block_type_once, init_tensor_once


if INTERPRETED:
    build_each_shape_once()
    search_each_module_once_per_launch()
    skip_overflow_checks()
    find_each_numpy_dtype_once()
