# The Python REPL of msb-portal. It reads runs from descriptor 3, executes them in one persistent
# __main__ module and reports on descriptor 4. repl.go describes the protocol.
#
# Every import here delays the first run of a sandbox. This file therefore imports only modules
# that are built into the interpreter or already loaded, and not signal, ast or types.
import _ast
import _signal
import _thread
import builtins
import io
import os
import sys
import time

RUNS, CONTROL = 3, 4
READY, OK, FAILED, SYNC = b"r", b"+", b"-", 0x80
# How many of the last runs keep their source, so that tracebacks can show its lines.
MAX_SOURCES = 1000
# Code flags, as defined in the modules inspect and __future__.
CO_COROUTINE = 0x80
CO_FUTURES = 0x1FE0000

main_pid = os.getpid()
main_thread = _thread.get_ident()
environ = os.environ  # also if the code replaces it
running = False
interruptible = False


class Stream(io.FileIO):
    """Descriptor 1 or 2. A write first waits until the portal has read what the other stream wrote."""

    last = 1
    token = SYNC

    def write(self, data):
        fd = self.fileno()
        # Only the main thread may read from CONTROL, and only during a run. A forked child must not.
        if fd != Stream.last and running and _thread.get_ident() == main_thread:
            Stream.sync()
            Stream.last = fd
        while (n := super().write(data)) is None:
            time.sleep(0.001)  # the pipe is full, and a child process has made it non-blocking
        return n

    @staticmethod
    def sync():
        Stream.token = SYNC | (Stream.token + 1) % SYNC
        os.write(CONTROL, bytes([Stream.token]))
        # Skip answers to earlier syncs, which were cut short by an interrupt.
        while (answer := os.read(CONTROL, 1)) and answer[0] != Stream.token:
            pass


class Session:
    def __init__(self):
        self.module = type(sys)("__main__")
        self.module.__builtins__ = builtins
        self.flags = _ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        self.loop = None
        self.count = 0
        self.sources = {}
        self.stdin = sys.stdin
        sys.modules["__main__"] = self.module

    def run(self, options, source):
        """Executes source, prints its error if it raised one, and returns whether it succeeded."""
        global running, interruptible
        running = True
        directory, *entries = options.split("\0")
        entries = dict(entry.split("=", 1) for entry in entries)
        previous = {name: environ.get(name) for name in entries}
        previous_directory = None
        self.renew_stdin()
        try:
            try:
                interruptible = True
                environ.update(entries)
                if directory:
                    previous_directory = os.open(".", os.O_PATH)
                    os.chdir(directory)
                self.execute(source)
            finally:
                interruptible = False
            return True
        except SystemExit as e:
            if e.code is not None and not isinstance(e.code, int):
                attempt("print the exit message", print, e.code, file=sys.stderr)
            return e.code is None or e.code == 0
        except BaseException as e:
            attempt("print the exception", self.show, e)
            return False
        finally:
            # The code may have closed or replaced sys.stdout and sys.stderr.
            attempt("flush output", lambda: sys.stdout.flush())
            attempt("flush output", lambda: sys.stderr.flush())
            for name, value in previous.items():
                if value is None:
                    environ.pop(name, None)
                else:
                    environ[name] = value
            if previous_directory is not None:
                attempt("return to the previous directory", os.chdir, previous_directory)
                os.close(previous_directory)
            running = False

    def renew_stdin(self):
        """Makes sys.stdin a stream without the buffer of the last run, unless the code has replaced it."""
        if sys.stdin is self.stdin:
            raw = io.BufferedReader(io.FileIO(0, "r", closefd=False))
            sys.stdin = sys.__stdin__ = self.stdin = io.TextIOWrapper(raw, "utf-8")

    def execute(self, source):
        """Executes source. If it ends with an expression, passes its value to sys.displayhook."""
        name = self.remember(source)
        tree = compile(source, name, "exec", self.flags | _ast.PyCF_ONLY_AST, True)
        last = []
        if tree.body and isinstance(tree.body[-1], _ast.Expr):
            last = [tree.body.pop()]
        self.evaluate(self.compile(tree, name, "exec"))
        if last:
            self.evaluate(self.compile(_ast.Interactive(last), name, "single"))

    def compile(self, tree, name, mode):
        code = compile(tree, name, mode, self.flags, True)
        self.flags |= code.co_flags & CO_FUTURES
        return code

    def evaluate(self, code):
        pending = eval(code, self.module.__dict__)
        if not code.co_flags & CO_COROUTINE:
            return
        import asyncio

        if self.loop is None or self.loop.is_closed():
            self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        task = self.loop.create_task(pending)
        try:
            self.loop.run_until_complete(task)
        except KeyboardInterrupt:
            task.cancel()
            self.loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
            raise

    def remember(self, source):
        """Stores source for tracebacks and returns the file name for it."""
        self.count += 1
        name = f"<python-input-{self.count}>"
        self.sources[name] = len(source), None, [s + "\n" for s in source.split("\n")], name
        stale = f"<python-input-{self.count - MAX_SOURCES}>"
        self.sources.pop(stale, None)
        if "linecache" in sys.modules:
            sys.modules["linecache"].cache.pop(stale, None)
        # Importing linecache is slow. Code that imports nothing cannot inspect tracebacks, so it does
        # not need linecache.
        if "linecache" in sys.modules or "import" in source:
            self.publish()
        return name

    def publish(self):
        """Makes the stored sources available to tracebacks."""
        import linecache

        linecache.cache.update(self.sources)

    def show(self, e):
        """Prints e as the interpreter does, without the frames of this file."""
        tb = e.__traceback__
        while tb and tb.tb_frame.f_code.co_filename not in self.sources:
            tb = tb.tb_next
        e.__traceback__ = tb
        sys.last_type, sys.last_value, sys.last_traceback = type(e), e, tb
        if sys.excepthook is not sys.__excepthook__:
            sys.excepthook(type(e), e, tb)
            return
        import traceback

        self.publish()
        traceback.print_exception(type(e), e, tb)


def attempt(what, f, *args, **kwargs):
    """Calls f, which may run the user's code, and reports its exception on descriptor 2."""
    try:
        f(*args, **kwargs)
    except BaseException as e:
        os.write(2, f"could not {what} at the end of the run: {type(e).__name__}\n".encode())


def on_interrupt(signum, frame):
    if interruptible:
        raise KeyboardInterrupt


def in_forked_child():
    global running
    running = False
    os.close(RUNS)
    os.close(CONTROL)
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)


def read_text():
    return read_exactly(int.from_bytes(read_exactly(4), "big")).decode()


def read_exactly(n):
    data = b""
    while len(data) < n:
        piece = os.read(RUNS, n - len(data))
        if not piece:
            sys.exit()
        data += piece
    return data


def main():
    try:
        os.chdir(".")
    except OSError:
        os.chdir("/")  # the user may not enter the working directory of the image
    for fd in RUNS, CONTROL:
        os.set_inheritable(fd, False)
    os.register_at_fork(after_in_child=in_forked_child)
    _signal.signal(_signal.SIGINT, on_interrupt)
    for fd, name, errors in (1, "stdout", "strict"), (2, "stderr", "backslashreplace"):
        raw = io.BufferedWriter(Stream(fd, "w", closefd=False))
        stream = io.TextIOWrapper(raw, "utf-8", errors, line_buffering=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = [""]
    session = Session()
    os.write(CONTROL, READY)
    while True:
        options = read_text()
        ok = session.run(options, read_text())
        if os.getpid() != main_pid:
            os._exit(0 if ok else 1)  # this is a child that the code forked
        os.write(CONTROL, OK if ok else FAILED)


main()
