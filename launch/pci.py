"""GPUs on the PCI bus: their order, NUMA node and how near they are to each other.

Links are named as nvidia-smi names them, read off the bus alone: PIX (one switch between), PHB (one
host bridge), NODE (one NUMA node), SYS (across nodes). Direct links such as NVLink do not show in
sysfs. No torch.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from .sysfs import SysRoot

DEVICES = "/sys/bus/pci/devices"
_NVIDIA_CARDS = "/proc/driver/nvidia/gpus"
_NVIDIA, _AMD, _INTEL = 0x10DE, 0x1002, 0x8086
# Class codes without the programming interface. Server boards carry a small VGA chip for remote
# consoles, hence the vendors; integrated Intel graphics are VGA (0x0300) too.
_GPU_CLASSES = {_NVIDIA: (0x0300, 0x0302), _AMD: (0x0300, 0x0302, 0x0380, 0x1200), _INTEL: (0x0380,)}


@dataclass(frozen=True)
class Gpu:
    """One GPU. index counts in PCI order, which CUDA_DEVICE_ORDER=PCI_BUS_ID makes CUDA's own."""

    index: int
    address: str
    node: int | None  # None where the firmware does not say (-1)
    links: tuple[str, ...] = ()  # to each GPU, itself included ("X")


def _is_usable(root: SysRoot, address: str, vendor: int) -> bool:
    """Whether programs can use the card: the bus shows all cards of the host to any container.

    A container may be given some of them, or none: the driver's files tell, on the running host. The
    tree of another host may lack them.
    """
    if vendor == _NVIDIA:
        minor = re.search(r"Device Minor:\s*(\d+)", root.read(information_file(address)) or "")
        if minor is not None:
            return root.exists(f"/dev/nvidia{minor[1]}")
        # Some sandboxes hand devices in and hide the driver's /proc files.
        hidden = root.exists("/dev/nvidiactl") and not root.listdir(_NVIDIA_CARDS)
        return hidden or not root.is_live
    if vendor == _AMD:
        return root.exists("/dev/kfd") or not root.is_live
    return True


def information_file(address: str) -> str:
    """What the NVIDIA driver says of a card."""
    return f"{_NVIDIA_CARDS}/{address}/information"


def _bus_path(root: SysRoot, address: str) -> tuple[str, ...]:
    """Host bridge, bridges and switches down to the device, from the device's link."""
    real = os.path.realpath(root.path(f"{DEVICES}/{address}"))
    return tuple(part for part in real.split("/") if re.match(r"(pci)?[0-9a-f]{4}:[0-9a-f]{2}", part))


def _link(a: tuple[str, ...], b: tuple[str, ...], same_node: bool) -> str:
    shared = len(os.path.commonprefix([a, b]))
    if shared >= 2:
        return "PIX" if len(a) - shared <= 2 and len(b) - shared <= 2 else "PXB"
    if shared == 1:
        return "PHB"
    return "NODE" if same_node else "SYS"


def device_folders(root: SysRoot) -> tuple[str, ...]:
    """The real folders of the host's GPUs, as absolute names on that host."""
    top = os.path.realpath(root.root)
    real = (os.path.realpath(root.path(f"{DEVICES}/{gpu.address}")) for gpu in read_gpus(root))
    return tuple("/" + os.path.relpath(folder, top) for folder in real)


def read_gpus(root: SysRoot) -> tuple[Gpu, ...]:
    """The host's GPUs in PCI order."""
    found: list[tuple[str, int | None]] = []
    for address in root.listdir(DEVICES):
        vendor = root.read_int(f"{DEVICES}/{address}/vendor", 16)
        kind = root.read_int(f"{DEVICES}/{address}/class", 16)
        if vendor in _GPU_CLASSES and kind is not None and kind >> 8 in _GPU_CLASSES[vendor]:
            node = root.read_int(f"{DEVICES}/{address}/numa_node")
            if _is_usable(root, address, vendor):
                found.append((address, None if node is None or node < 0 else node))
    paths = [_bus_path(root, address) for address, _ in found]
    return tuple(
        Gpu(
            index,
            address,
            node,
            tuple(
                "X"
                if other == index
                else _link(paths[index], paths[other], node is not None and node == found[other][1])
                for other in range(len(found))
            ),
        )
        for index, (address, node) in enumerate(found)
    )
