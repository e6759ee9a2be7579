"""Makes Triton's interpreter fast enough to run every kernel test."""

import functools

from tokenpack.kernels._triton import INTERPRETED


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


if INTERPRETED:
    search_each_module_once_per_launch()
