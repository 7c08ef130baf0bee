"""What /proc and /sys say on machines that nobody has at hand: trees of files for `tinychat doctor` to read."""

from pathlib import Path

ARM_CPU = "processor\t: {n}\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU part\t: {part}\n\n"
A72 = "fp asimd evtstrm crc32 cpuid"
A76 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
X86 = "fpu sse2 avx avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni avx_vnni amx_bf16 amx_tile amx_int8"


def arm(n, features, part):
    return "".join(ARM_CPU.format(n=i, features=features, part=part) for i in range(n))


def meminfo(total, available, swap=0, swap_free=0):
    rows = {"MemTotal": total, "MemFree": available // 2, "MemAvailable": available}
    rows |= {"SwapTotal": swap, "SwapFree": swap_free}
    return "".join(f"{name}: {kilobytes} kB\n" for name, kilobytes in rows.items())


def clock(policy, cpus, now, allowed, possible, governor, driver="cpufreq-dt"):
    at = f"sys/devices/system/cpu/cpufreq/policy{policy}"
    return {
        f"{at}/affected_cpus": f"{cpus}\n",
        f"{at}/scaling_cur_freq": f"{now}\n",
        f"{at}/scaling_max_freq": f"{allowed}\n",
        f"{at}/cpuinfo_max_freq": f"{possible}\n",
        f"{at}/scaling_governor": f"{governor}\n",
        f"{at}/scaling_driver": f"{driver}\n",
    }


def zone(number, kind, milli, passive=None):
    at = f"sys/class/thermal/thermal_zone{number}"
    files = {f"{at}/type": f"{kind}\n", f"{at}/temp": f"{milli}\n"}
    if passive is not None:
        files |= {f"{at}/trip_point_0_type": "critical\n", f"{at}/trip_point_0_temp": "110000\n"}
        files |= {f"{at}/trip_point_1_type": "passive\n", f"{at}/trip_point_1_temp": f"{passive}\n"}
    return files


def cpus(online, present=None, allowed=None):
    return {
        "sys/devices/system/cpu/online": f"{online}\n",
        "sys/devices/system/cpu/present": f"{present or online}\n",
        "proc/self/status": f"Name:\tpython\nCpus_allowed:\tf\nCpus_allowed_list:\t{allowed or online}\n",
        "proc/self/cgroup": "0::/user.slice\n",
    }


# 4 GB, hot, on a phone's charger: the firmware's word is that of under-voltage and throttling, now and before.
PI_4 = {
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "proc/cpuinfo": arm(4, A72, "0xd08") + "Hardware\t: BCM2835\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n",
    "proc/meminfo": meminfo(3885396, 3512000, 102396, 102396),
    "proc/swaps": "Filename\t\tType\t\tSize\tUsed\tPriority\n/var/swap   file\t102396\t0\t-2\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
    **cpus("0-3"),
    **zone(0, "cpu-thermal", 82300),
    **clock(0, "0 1 2 3", 600000, 1800000, 1800000, "ondemand"),
}

PI_5 = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/cpuinfo": arm(4, A76, "0xd0b"),
    "proc/meminfo": meminfo(8256000, 7412000, 204784, 204784),
    "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled": "0\n",
    **cpus("0-3"),
    **zone(0, "cpu-thermal", 48000),
    **clock(0, "0 1 2 3", 2400000, 2400000, 2400000, "ondemand"),
}

# 7 W: two of six cores off, the clock held down.
ORIN_NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "proc/cpuinfo": arm(4, f"{A76} uscat ilrcpc flagm", "0xd42"),
    "proc/meminfo": meminfo(7802000, 5911000, 3900000, 3100000),
    "proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 3900000 800000 5\n",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=7W >\n"
    "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PM_CONFIG DEFAULT=0 >\n",
    "var/lib/nvpmodel/status": "pmode:0001 fmode:quiet",
    **cpus("0-3", "0-5"),
    **zone(0, "cpu-thermal", 51000, 99000),
    **zone(1, "gpu-thermal", 52500, 99000),
    **clock(0, "0 1 2 3", 960000, 960000, 1510400, "schedutil", "tegra194"),
}

SERVER = {
    "sys/class/dmi/id/product_name": "ThinkSystem SR650\n",
    "proc/cpuinfo": "".join(
        f"processor\t: {n}\nmodel name\t: Intel(R) Xeon(R) Gold 6548Y+\nflags\t\t: {X86}\n\n" for n in range(4)
    ),
    "proc/meminfo": meminfo(263000000, 250000000),
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 2024\n",
    "proc/driver/nvidia/gpus/0000:17:00.0/information": "Model: \t\t NVIDIA H100 PCIe\nIRQ:   \t\t 24\n",
    "sys/devices/system/cpu/cpu0/cache/index3/size": "61440K\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "0\n",
    **{f"sys/devices/system/cpu/cpu{n}/topology/physical_package_id": "0\n" for n in range(4)},
    **{f"sys/devices/system/cpu/cpu{n}/topology/core_id": f"{n % 2}\n" for n in range(4)},
    **cpus("0-3"),
    **clock(0, "0", 4100000, 4100000, 4100000, "powersave", "intel_pstate"),
}

# The same machine, of which a container gets 1.5 CPUs and 2 GiB, half a GiB of them in use.
CONTAINER = {
    **SERVER,
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/memory.max": f"{2 << 30}\n",
    "sys/fs/cgroup/memory.current": f"{1 << 29}\n",
    "sys/fs/cgroup/memory.stat": "inactive_file 0\nactive_file 0\n",
}

ALL = {"pi 4": PI_4, "pi 5": PI_5, "orin nano": ORIN_NANO, "server": SERVER, "container": CONTAINER}


def plant(files: dict[str, str], root: Path) -> Path:
    """`root`, with these files below it."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root
