"""The kernel's edge without a kernel: errors, artefacts, memory, arguments."""

import errno

import numpy as np
import pytest

from xdp import artifacts
from xdp.abi import CONST
from xdp.errors import KernelError, VerifierError, XdpError
from xdp.maps import Map
from xdp.umem import FRAMES_LEAST, Umem

LOG = "\n".join(
    [
        "0: R1=ctx() R10=fp0",
        *(f"{n}: (07) r1 += {n}" for n in range(1, 40)),
        "; return *(char *)(long)ctx->data;",
        "R1 invalid mem access 'scalar'",
        "",
        "processed 41 insns (limit 1000000) max_states_per_insn 0",
        "-- END PROG LOAD LOG --",
    ]
)


def test_a_refusal_shows_the_end_of_the_log_without_statistics():
    error = VerifierError("steer.o", errno.EACCES, LOG)
    lines = str(error).splitlines()
    assert lines[0] == "steer.o: Permission denied"
    assert lines[-1].strip() == "R1 invalid mem access 'scalar'"
    assert len(lines) == 1 + VerifierError.LINES
    assert error.log == LOG
    assert error.errno == errno.EACCES


def test_a_kernel_error_names_call_and_fix():
    error = KernelError("bind(ifindex 7)", -errno.EPERM)
    assert isinstance(error, XdpError)
    assert error.errno == errno.EPERM
    assert str(error).startswith("bind(ifindex 7): Operation not permitted; run as root")
    assert str(KernelError("update", errno.E2BIG, "limit 4")).endswith("; limit 4")


def test_an_artefact_is_found_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PENSTOCK_LIB_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*make build"):
        artifacts.find("no-such.bpf.o")
    (tmp_path / "penstock.bpf.o").write_bytes(b"mine")
    assert artifacts.find("penstock.bpf.o") == tmp_path / "penstock.bpf.o"


def test_frames_lie_at_their_addresses():
    umem = Umem(FRAMES_LEAST, huge=False)
    assert not umem.huge
    assert umem.address == umem.area.ctypes.data
    assert umem.size == len(umem.area)
    assert umem.size % 4096 == 0
    assert umem.frame_count * CONST["FRAME_STRIDE"] <= umem.size
    last = (FRAMES_LEAST - 1) * CONST["FRAME_STRIDE"]
    umem.area[last : last + CONST["FRAME_SIZE"]] = 7
    kept = umem.area[last : last + 1]
    umem.close()
    umem.close()
    assert umem.address == 0
    assert kept[0] == 7, "memory stays while somebody looks at it"


@pytest.mark.parametrize("count", [0, -1, FRAMES_LEAST - 1, 1 << 30])
def test_a_number_of_frames_out_of_range_is_refused(count):
    with pytest.raises(ValueError, match=str(count)):
        Umem(count)


@pytest.mark.parametrize("key", [-1, 1 << 32, np.int64(-5), b"", b"12345"])
def test_a_key_that_does_not_fit_is_refused_before_the_kernel_sees_it(key):
    with pytest.raises(ValueError, match="map m: key"):
        Map("m", -1, 4, 8, 1).lookup(key)


def test_a_map_that_is_gone_is_an_error():
    gone = Map("m", -1, 4, 8, 1)
    for call in (lambda: gone.lookup(0), lambda: gone.update(0, 1), lambda: gone.delete(0)):
        with pytest.raises(KernelError, match="map m"):
            call()
    with pytest.raises(KernelError, match="map m"):
        gone.mmap(np.dtype(np.uint64))
