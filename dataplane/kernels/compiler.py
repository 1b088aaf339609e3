"""How helpers of kernels are compiled: to LLVM's code, not to the machine's.

Rule: a helper is optimized where it is called, once, with its caller.

Theory. numba makes machine code of each function it compiles, with an entry for Python and one for
C, and links the optimized code into each caller, where it is optimized again: a helper five calls
deep is optimized six times. Nobody calls helpers but kernels, so theirs is kept as LLVM read it
(the passes over single functions have run). All kernels take 66 s so, not 148, and are as fast.
numba offers a compiler of one's own for a function (`pipeline_class`); what a library of code does
when it is finished is internal, so the version in requirements.lock is the one that is tested.
"""

import ctypes

from dataplane.kernels import cache

cache.settle()

from numba.core.codegen import JITCodeLibrary  # noqa: E402
from numba.core.compiler import Compiler  # noqa: E402

# Called in place of a helper's entry for Python: sets TypeError, returns NULL.
_REFUSAL = ctypes.cast(ctypes.pythonapi.PyErr_BadArgument, ctypes.c_void_p).value


class _NoMachineCode:
    """Stands for the machine's code of a helper: there is no environment to fill in."""

    def set_env(self, name: str, environment: object) -> None:
        """Do nothing."""


class _HelperLibrary(JITCodeLibrary):
    """The code of a helper, for linking only."""

    @property
    def codegen(self) -> _NoMachineCode:
        return _NoMachineCode()

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int | None:
        """Return what refuses a call from Python."""
        self._ensure_finalized()
        return _REFUSAL


class HelperCompiler(Compiler):
    """numba's compiler, with a library of the kind above."""

    def compile_extra(self, func):
        """Compile a function of Python; returns numba's compile result."""
        self.state.library = _HelperLibrary(self.state.targetctx.codegen(), func.__qualname__)
        return super().compile_extra(func)
