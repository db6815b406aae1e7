"""The launcher of this process (torchrun, srun, mpirun): its rank and world, where rank 0 is, which network to use.

torchrun's variables win, then those of mpirun (Open MPI, or PMI as MPICH and Intel MPI have it), then SLURM's. What
was found is written into torchrun's variables, which torch reads.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data.batch import UserError

# launcher -> its variables for rank, world size, local rank, local world size; "" where it has none
VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                 "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "PMI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ""),
}
DEFAULT_PORT = 29500  # torchrun's
SIOCGIFADDR = 0x8915  # Linux: address of a network interface
ELSEWHERE = "192.0.2.1"  # an address reserved for documentation: packets to it would take the default route


@dataclass(frozen=True)
class Launch:
    """This process among all that one launcher started."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 0  # ranks on this machine, 0 where the launcher does not say
    launcher: str = ""  # "": no launcher
    certain: bool = True  # False: the variables may be those of a script around this process, which no launcher started
    remark: str = ""  # a line for the user


def read_launch() -> Launch:
    """Return this process's place in the job, and write it into torchrun's environment variables for torch.

    Raises UserError where a variable is no number, or the rank is not below the world size.
    """
    launch = _find_launch()
    if launch.rank >= launch.size:
        rank, size = VARIABLES[launch.launcher or "torchrun"][:2]
        raise UserError(f"the environment variables {rank} and {size} say rank {launch.rank} of {launch.size}"
                        f"{'' if size in os.environ else f' ({size} is not set)'}; start several ranks with "
                        f"`torchrun --nproc-per-node N run.py`, without torchrun `unset {rank} {size}`")
    _number("LOCAL_WORLD_SIZE", "torchrun")
    if launch.size == 1:
        return launch
    if launch.launcher != "torchrun":
        own = {"RANK": launch.rank, "WORLD_SIZE": launch.size, "LOCAL_RANK": launch.local_rank}
        if launch.local_size:
            own["LOCAL_WORLD_SIZE"] = launch.local_size
        os.environ |= {name: str(value) for name, value in own.items()}
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _address_of_rank_0(launch)
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(_port())
    if "MASTER_PORT" in os.environ and not 0 < _number("MASTER_PORT", launch.launcher) < 1 << 16:
        raise UserError(f"the environment variable MASTER_PORT is {os.environ['MASTER_PORT']}, which is no port; it "
                        "must be within 1 and 65535")
    return launch


def _find_launch() -> Launch:
    if any(name in os.environ for name in VARIABLES["torchrun"][:3]):
        return _launch_of("torchrun")
    for launcher in ("Open MPI", "PMI"):
        if all(name in os.environ for name in VARIABLES[launcher][:2]):
            return _launch_of(launcher)
    if "SLURM_PROCID" not in os.environ or "SLURM_NTASKS" not in os.environ:
        return Launch()
    launch = _launch_of("SLURM")
    if launch.size == 1 or launch.rank > 0 or "SLURM_STEP_ID" in os.environ:
        return launch
    # Rank 0 without a step: a script of sbatch, which SLURM starts once, as task 0 of however many tasks; or srun with
    # an environment that a container has thinned out. SLURM_TASK_PID is set for both by SLURM itself.
    if "SLURM_TASK_PID" in os.environ:
        return Launch(launcher="SLURM", remark=f"one process: SLURM_NTASKS is {launch.size}, but no srun started this "
                                               "one; `srun python run.py` trains on all tasks")
    return Launch(launch.rank, launch.local_rank, launch.size, launch.local_size, "SLURM", certain=False)


def _launch_of(launcher: str) -> Launch:
    """Return what a launcher's variables say."""
    rank, size, local_rank, local_size = VARIABLES[launcher]
    if launcher == "PMI" and local_rank not in os.environ:  # srun --mpi=pmi2
        local_rank = "SLURM_LOCALID"
    if launcher == "SLURM" and "SLURM_STEP_NUM_TASKS" in os.environ:  # of the step, where the job has more
        size = "SLURM_STEP_NUM_TASKS"
    return Launch(_number(rank, launcher), _number(local_rank, launcher), _number(size, launcher, 1),
                  _number(local_size, launcher), launcher)


def _number(name: str, launcher: str, default: int = 0) -> int:
    text = os.environ.get(name, "").strip()
    if name not in os.environ:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"the environment variable {name} is {text[:40]!r}, which is no number; {launcher} sets it, "
                        f"without {launcher} `unset {name}`")
    return int(text)


def _address_of_rank_0(launch: Launch) -> str:
    """Return the first host of SLURM's list of nodes, or this machine for ranks that are all here. Raises UserError."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if host := first_host(os.environ.get(name, "")):
            return host
    if launch.local_size == launch.size or launch.launcher == "SLURM":
        return "127.0.0.1"
    raise UserError(f"{launch.launcher} does not say which machine rank 0 is on; set MASTER_ADDR to its name for all "
                    "ranks, as in `mpirun -x MASTER_ADDR=HOST`")


def first_host(nodes: str) -> str:
    """Return the first host of a list such as `node[01-03,7],gpu-a`, "" for an empty list."""
    first = re.match(r"(?:[^,\[\]]|\[[^\]]*\])*", nodes.strip())
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else ""


def _port() -> int:
    """Return a port that all ranks derive from the SLURM job and its step, so that two jobs on a node do not meet."""
    if "SLURM_JOB_ID" not in os.environ:
        return DEFAULT_PORT
    step = os.environ.get("SLURM_STEP_ID", "0")
    return 15_000 + (_number("SLURM_JOB_ID", "SLURM") + 101 * (int(step) if step.isdecimal() else 0)) % 15_000


def choose_interface(launch: Launch) -> None:
    """Let gloo use the network interface that reaches rank 0, unless GLOO_SOCKET_IFNAME names one.

    By itself gloo takes the address that the host's own name has, which on many machines is one that no other reaches.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    master = os.environ.get("MASTER_ADDR", "")
    name = interface_towards("127.0.0.1" if launch.local_size == launch.size else master)
    if name == interface_towards("127.0.0.1") and launch.local_size != launch.size and not _is_loopback(master):
        name = interface_towards(ELSEWHERE)  # /etc/hosts gives this host's name a loopback address: others see another
    if name:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def describe_network() -> str:
    """Return which network interfaces ranks use among one another, and how to name others, for an error."""
    names = [f"{name} is {os.environ.get(name, 'not set')}" for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")]
    return f"{', '.join(names)}: each names the interface to use"


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def interface_towards(host: str) -> str:
    """Return the name of the network interface by which packets to `host` leave; "" where that is not known."""
    with suppress(OSError):  # no such host, or no way there
        family, kind, protocol, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)  # sends nothing: it only chooses a route
            return _interface_of(probe.getsockname()[0])
    return ""


def _interface_of(address: str) -> str:
    """Return the name of the interface that has an address, "" where none is found."""
    if ":" in address:
        with suppress(OSError):
            number = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
            for line in Path("/proc/net/if_inet6").read_text().splitlines():
                if line.startswith(number):
                    return line.split()[-1]
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24]) == address:
                    return name
    return ""
