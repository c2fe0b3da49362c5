"""The sandbox against programs that attack. Each attack is first run without it, to show that it would succeed."""

import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from colora.rewards import sandbox, sandbox_child
from colora.rewards.sandbox import LAYERS, Limits, SandboxError, layers, run_python

REASONS = layers()


def needs(*names):
    missing = {name: REASONS[name] for name in names if REASONS[name]}
    return pytest.mark.skipif(bool(missing), reason=f"the sandbox lacks layers here: {missing}")


pytestmark = needs("rlimits")
MARK = f"test-{os.getpid()}"  # an argument: other sandboxes of the machine are not this test's
AVAILABLE = [name for name in LAYERS if not REASONS[name]]


def run(source, limits=None, **kwargs):
    """With more time than is needed on any machine, where a test says nothing else."""
    return run_python(source, limits=limits or Limits(seconds=120), require=AVAILABLE, **kwargs)


def attack(layer, name, source):
    return pytest.param(source, id=name, marks=needs(layer))


# Each prints "escaped" where it succeeds. {victim} is a file outside, {port} listens, {parent} is a process outside.
RAW = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
ATTACKS = [
    attack("seccomp", "tcp", "import socket; socket.create_connection(('127.0.0.1', {port}), 1); print('escaped')"),
    attack("seccomp", "udp", "import socket; socket.socket(type=2).sendto(b'x', ('127.0.0.1', 9)); print('escaped')"),
    attack(
        "seccomp",
        "unix_datagram_pair",
        "import socket; s, _ = socket.socketpair(type=socket.SOCK_DGRAM); s.sendto(b'x', {unix!r}); print('escaped')",
    ),
    attack("seccomp", "fork", "import os\nif os.fork() == 0: print('escaped')\nelse: os.wait()"),
    attack("seccomp", "subprocess", "import subprocess; subprocess.run(['/bin/echo', 'escaped'], check=True)"),
    attack("seccomp", "exec", "import os; os.execv('/bin/echo', ['echo', 'escaped'])"),
    attack("seccomp", "spawn", "import os; os.waitpid(os.posix_spawn('/bin/echo', ['echo', 'escaped'], {{}}), 0)"),
    attack("seccomp", "signal", "import os; os.kill({parent}, 0); print('escaped')"),
    attack("seccomp", "signal_group", "import os; os.killpg({parent_group}, 0); print('escaped')"),
    attack("seccomp", "thread_signal", RAW + "if libc.syscall(234, {parent}, {parent}, 0) == 0: print('escaped')")
    if platform.machine() == "x86_64"
    else attack("seccomp", "pidfd_signal", "import signal, os; os.pidfd_open({parent}); print('escaped')"),
    attack(
        "seccomp",
        "signal_by_owner",
        "import fcntl, os; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, {parent}); print('escaped')",
    ),
    attack(
        "seccomp",
        "limits_of_others",
        "import resource; resource.prlimit({parent}, resource.RLIMIT_CORE, (0, 0)); print('escaped')",
    ),
    attack(
        "seccomp",
        "slow_down_others",
        "import os; a = os.sched_getaffinity(0); os.sched_setaffinity({parent}, a)\nprint('escaped')",
    ),
    attack("seccomp", "mode_outside", "import os; os.chmod({victim!r}, 0o777); print('escaped')"),
    attack("seccomp", "time_outside", "import os; os.utime({victim!r}); print('escaped')"),
    attack("seccomp", "truncate_outside", "import os; os.truncate({victim!r}, 6); print('escaped')"),
    attack("landlock", "read_outside", "if open({victim!r}).read() == 'secret': print('escaped')"),
    attack("landlock", "write_outside", "open({victim!r}, 'a').close(); print('escaped')"),
    attack("landlock", "create_outside", "open({victim!r} + '.new', 'w').close(); print('escaped')"),
    attack("landlock", "list_outside", "import os; os.listdir({folder!r}); print('escaped')"),
    attack("landlock", "unlink_outside", "import os; os.unlink({folder!r} + '/to_unlink'); print('escaped')"),
    attack("landlock", "symlink", "import os; os.symlink({victim!r}, 'a'); open('a').read(); print('escaped')"),
    attack("landlock", "symlink_folder", "import os; os.symlink({folder!r}, 'b'); os.listdir('b'); print('escaped')"),
    attack("landlock", "hard_link", "import os; os.link({victim!r}, 'c'); open('c').read(); print('escaped')"),
    attack("landlock", "rename_in", "import os; os.rename({folder!r} + '/to_move', 'd'); print('escaped')"),
    attack("landlock", "dots", "import os; os.chdir('..'); os.listdir('.'); print('escaped')"),
    attack("landlock", "environment_of_others", "open('/proc/{parent}/environ').read(); print('escaped')"),
    attack("landlock", "accounts", "open('/etc/passwd').read(); print('escaped')"),
]


@pytest.fixture
def outside():
    """Things that a program could reach: a file's folder, listening sockets, and a process that is not its parent."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("victim", "to_unlink", "to_move"):
            Path(folder, name).write_text("secret")
            Path(folder, name).chmod(0o644)
        unix = os.path.join(folder, "socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
            datagrams.bind(unix)
            process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
            names = {"folder": folder, "victim": os.path.join(folder, "victim"), "unix": unix}
            yield names | {"port": server.getsockname()[1], "parent": process.pid, "parent_group": process.pid}
            process.kill()
            process.communicate()


@pytest.mark.parametrize("source", ATTACKS)
def test_attack(source, outside, tmp_path_factory):
    source = source.format(**outside)
    contained = run(source)
    assert "escaped" not in contained.stdout
    assert contained.status == 1 or not contained.stderr, contained  # an ordinary exception of Python
    victim = Path(outside["victim"])
    assert victim.read_text() == "secret"
    assert victim.stat().st_mode & 0o777 == 0o644
    plain = tempfile.mkdtemp(dir=outside["folder"])  # the same file system: hard links and renames work
    free = subprocess.run([sys.executable, "-c", source], cwd=plain, capture_output=True, text=True, timeout=120)
    assert "escaped" in free.stdout, free.stderr


@needs("seccomp")
def test_raw_system_calls_are_filtered_too():
    calls = {"x86_64": {"socket": (41, 2, 1, 0), "fork": (57,), "clone": (56, 17, 0, 0, 0, 0), "kill": (62, 1, 0)}}
    calls["aarch64"] = {"socket": (198, 2, 1, 0), "clone": (220, 17, 0, 0, 0, 0), "kill": (129, 1, 0)}
    wanted = calls[platform.machine()]
    source = RAW + f"for call in {list(wanted.values())}:\n    print(libc.syscall(*call), ctypes.get_errno())"
    assert run(source).stdout.split("\n")[:-1] == ["-1 1"] * len(wanted)
    # clone3 and io_uring would go around the filter; x32 numbers would miss its table.
    unknown = RAW + "for call in ((435, 0, 0), (463, 0), (0x40000000 + 41, 2, 1, 0)):\n"
    assert run(unknown + "    print(libc.syscall(*call), ctypes.get_errno())").stdout == "-1 38\n" * 3
    assert run(RAW + "print(libc.syscall(425, 1, 0), ctypes.get_errno())").stdout == "-1 1\n"


@needs("seccomp")
def test_fork_bomb():
    source = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert run(source, arguments=[MARK], limits=Limits(seconds=0.5)).limit == "time"
    assert left_after(60) == []


@needs("seccomp")
def test_thread_bomb_ends_at_the_memory_limit():
    source = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
    result = run(source, limits=Limits(memory_bytes=256 * 2**20))
    assert (result.status, result.limit) == (1, None)
    assert "can't start new thread" in result.stderr


@needs("seccomp")
def test_limits_and_rights_cannot_be_raised():
    source = "import resource\nfor which in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):\n"
    source += "    try: resource.setrlimit(which, (-1, -1)); print('raised')\n    except (OSError, ValueError): pass"
    assert run(source).stdout == ""
    assert run(RAW + "print(libc.unshare(0x10000000), libc.mount(b'a', b'.', b'tmpfs', 0, 0))").stdout == "-1 -1\n"
    assert run(RAW + "print(libc.prctl(39, 0, 0, 0, 0))").stdout == "1\n"  # PR_GET_NO_NEW_PRIVS


@pytest.mark.parametrize(
    "source",
    ["a = bytearray(10**10)", "a = []\nwhile True: a.append('x' * 10**6 + str(len(a)))", "a = list(range(10**9))"],
)
def test_memory(source):
    result = run(source, limits=Limits(memory_bytes=200 * 2**20))
    assert (result.status, result.limit) == (1, "memory")


def test_a_program_gets_the_memory_it_may_have_and_no_more():
    source = """
taken = []
try:
    while True: taken.append('x' * 2**20 + str(len(taken)))
except MemoryError:
    count = len(taken)
    taken.clear()
print(count)
"""
    assert 100 < int(run(source, limits=Limits(memory_bytes=200 * 2**20)).stdout) < 200


def test_memory_outside_of_the_address_space():
    assert "escaped" not in run("import mmap; mmap.mmap(-1, 10**10); print('escaped')").stdout
    if not REASONS["seccomp"]:
        assert "escaped" not in run("import os; os.memfd_create('a'); print('escaped')").stdout


@pytest.mark.parametrize(
    "source",
    [
        "import time; time.sleep(60)",
        "while True: pass",
        "import os, time; os.close(1); os.close(2); time.sleep(60)",
        "import time\nfrom signal import *\nfor n in valid_signals() - {9, 19}: signal(n, SIG_IGN)\ntime.sleep(60)",
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    ],
)
def test_time(source):
    start = time.monotonic()
    result = run(source, limits=Limits(seconds=0.3, cpu_seconds=60))
    assert (result.status, result.limit) == (-9, "time")
    assert time.monotonic() - start < 30  # half of what it sleeps


def test_busy_cpu():
    result = run("print('before', flush=True)\nwhile True: pass", limits=Limits(cpu_seconds=1, seconds=120))
    assert (result.limit, result.stdout) == ("cpu", "before\n")


def test_files_too_large_and_too_many():
    result = run("open('a', 'wb').write(bytes(2 * 10**6))", limits=Limits(file_bytes=10**6))
    assert (result.status, result.limit) == (1, "file_size")
    result = run("print(len([open('main.py') for _ in range(100)]))")
    assert "Too many open files" in result.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_megabytes_of_output(stream):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = run(
        f"import sys\nwhile True: sys.{stream}.write('x' * 10**6)", limits=Limits(output_bytes=1000, seconds=120)
    )
    assert result.limit == "output"
    assert getattr(result, stream) == "x" * 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 2**10  # in KiB


def test_output_of_exactly_the_limit_is_whole():
    result = run("print('x' * 99)", limits=Limits(output_bytes=100))
    assert (result.stdout, result.status, result.limit) == ("x" * 99 + "\n", 0, None)
    assert run("print('x' * 100)", limits=Limits(output_bytes=100)).limit == "output"


def test_environment_descriptors_and_directory(monkeypatch):
    monkeypatch.setenv("SECRET", "of the parent")
    with tempfile.TemporaryFile() as file:
        os.set_inheritable(file.fileno(), True)
        source = (
            "import os\nfor fd in range(64):\n    try: print(os.fstat(fd) and fd, end=' ')\n    except OSError: pass\n"
        )
        result = run(source + "print(dict(os.environ), os.listdir('.'))")
    assert result.stdout == "0 1 2 {} ['main.py']\n"


def test_no_directory_stays_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run("import os\nfor _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')")
    run("import os; os.mkdir('a', 0); os.umask(0o777); open('b', 'w')")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_made_unreadable_goes_too(tmp_path):
    """By whoever is not root, which gets past every mode: without its capabilities it does not either."""
    script = (
        "from colora.rewards import sandbox, sandbox_child\n"
        "sandbox_child.drop_privileges()\n"
        "source = \"import os; os.mkdir('a', 0o300); os.mkdir('a/b', 0); open('a/c', 'w').close(); print('done')\"\n"
        "print(sandbox.run_python(source, require=()).stdout)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_seccomp_it_warns_and_kills_the_group(monkeypatch, caplog):
    monkeypatch.setattr(sandbox, "layers", lambda: REASONS | {"seccomp": "filtered out"})
    sandbox._active_layers.cache_clear()
    try:
        with pytest.raises(SandboxError, match="{'seccomp': 'filtered out'}.*require=\\['rlimits', 'landlock'\\]"):
            run_python("")
        daemon = "import os, time\nif os.fork() == 0:\n    time.sleep(60)\nprint('left')"
        result = run_python(daemon, arguments=[MARK], require=["rlimits"])
    finally:
        sandbox._active_layers.cache_clear()
    assert (result.stdout, result.limit) == ("left\n", None)
    assert result.seconds < 30  # half of what the daemon sleeps
    assert "without these layers of the sandbox: {'seccomp': 'filtered out'}" in caplog.text
    assert left_after(60) == []


def test_what_honest_programs_need_works():
    source = """
import asyncio, collections, datetime, decimal, hashlib, json, math, random, re, sqlite3, statistics, sys, threading
async def answer(): return await asyncio.to_thread(lambda: 42)
print(asyncio.run(answer()), input(), sys.argv[1:], random.random() < 1, __name__)
with open('notes.txt', 'w') as file: file.write('kept')
print(open('notes.txt').read(), '\u00e9')
"""
    result = run(source, stdin="line\n", arguments=["one"])
    assert (result.stderr, result.status, result.limit) == ("", 0, None)
    assert result.stdout == "42 line ['one'] True __main__\nkept é\n"


def test_status_errors_and_odd_sources():
    assert run("import sys; sys.exit(3)").status == 3
    assert run("import os; os.abort()").status == -6
    assert "ZeroDivisionError" in run("1 / 0").stderr
    assert "SyntaxError" in run("def").stderr
    assert run("a = '\ud800'").status == 1
    assert run("\0").status == 1


def test_from_many_threads():
    before = set(threading.enumerate())
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda number: run(f"print({number})"), range(16)))
    assert [result.stdout for result in results] == [f"{number}\n" for number in range(16)]
    assert set(threading.enumerate()) <= before


def test_wrong_settings():
    with pytest.raises(ValueError, match="seconds=0"):
        Limits(seconds=0)
    with pytest.raises(ValueError, match="no such layer as \\['firewall'\\]"):
        run_python("", require=["firewall"])


def test_a_program_that_cannot_begin_is_an_error():
    with pytest.raises(SandboxError, match="failed before the program began"):
        run("", limits=Limits(open_files=3))


def left_after(seconds):
    """Sandboxes that still run then: the kernel ends a killed group's processes one by one, after the call returned."""
    deadline = time.monotonic() + seconds
    while (found := running_sandboxes()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def running_sandboxes():
    """Command lines of processes, whoever their parent is by now, that run the sandbox's script."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if os.fsencode(sandbox_child.__file__) in command and os.fsencode(MARK) in command:
            found.append(command)
    return found
