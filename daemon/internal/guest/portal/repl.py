# The Python REPL of msb-portal. It reads runs from one socket, executes them in one persistent __main__ module and reports on
# another. session.go describes the protocol.
#
# The code of the runs shares this interpreter. So this file uses no object that the code may replace: it has its own copy of
# the builtins (see language.go), and takes the functions that it needs from the modules at the start.
#
# Every import here delays the first run of a sandbox. This file therefore imports only modules that are built into the
# interpreter or already loaded, and not signal, ast or types. Some functions import more when they are used.
import _ast
import _contextvars
import _signal
import _thread
import _warnings
import builtins
import io
import os
import sys
from os import chdir, close, dup, dup2, environ, fstat, getpid, read, write
from time import sleep

# The sockets begin as 3 and 4. They move out of the reach of code that closes all descriptors that programs usually have.
RUNS, CONTROL = 503, 504
READY, BEGUN, END, ERROR, RESULT, LATE, SYNC = b"r", b"b", b".", b"e", b"d", b"l", b"s"
MAX_PIECE = 60000  # bytes of a message
TOKEN_SIZE = 26
FIRST = 2  # a flag of a piece
WITH_RESULTS, WITH_BEGUN, REHEARSAL = 1, 2, 4  # flags of a run
FILE_NAME = "<repl>"  # of this file, in tracebacks
# How many of the last runs keep their source, so that tracebacks can show its lines.
MAX_SOURCES = 1000
# Code flags, as defined in the modules inspect and __future__.
CO_COROUTINE = 0x80
CO_FUTURES = 0x1FE0000

main_pid = getpid()
get_ident = _thread.get_ident
main_thread = get_ident()
session_token = run_token = b""
running = False
interruptible = False
forked = False  # this is a child of the REPL
# The run to which what executes belongs: threads and tasks keep that of the run that started them.
current_run = _contextvars.ContextVar("run")
run_number = 0
sending = _thread.allocate_lock()


def send(kind, data=b"", token=None):
    """Sends a message to the portal."""
    write(CONTROL, (token or run_token) + kind + data)


def send_json(kind, value):
    """Sends an object in pieces. The first byte of each has a flag for the first one and one for the last one."""
    import json

    data = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str).encode("utf-8", "replace")
    flush("stdout")
    flush("stderr")
    with sending:  # threads may send at the same time
        first = FIRST
        while True:
            send(kind, bytes([first | (len(data) <= MAX_PIECE)]) + data[:MAX_PIECE])
            data, first = data[MAX_PIECE:], 0
            if not data:
                break
    # Wait until the portal has it, so that what is printed from now on comes after it.
    if Raw.can_sync():
        Raw.sync()


def is_late():
    """Reports whether the caller belongs to a run that has ended."""
    return not forked and (not running or current_run.get(run_number) != run_number)


def send_late(fd, data):
    """Sends output of a thread or task of a run that has ended, which is not output of the run in progress."""
    for at in range(0, len(data), MAX_PIECE):
        send(LATE, bytes([fd]) + data[at : at + MAX_PIECE], session_token)


class Raw(io.FileIO):
    """Descriptor 1 or 2. A write first waits until the portal has read what the other stream wrote."""

    last = 1
    count = 0
    waiting = False
    written = b""  # what an interrupted write has written; the buffer still has it, and writes it again

    def write(self, data):
        written, self.written = self.written, b""
        if written and data[: len(written)] == written:
            return len(written)
        fd = self.fileno()
        if fd != Raw.last and Raw.can_sync():
            Raw.sync()
            Raw.last = fd
        n = []
        try:
            n.extend(map(super().write, (data,)))  # if the bytes were written, n says so, also if an interrupt comes then
            while n[-1] is None:
                sleep(0.001)  # the pipe is full, and a child process has made it non-blocking
                n.extend(map(super().write, (data,)))
        except BaseException:
            if n and n[-1] and len(data) <= io.DEFAULT_BUFFER_SIZE:  # the buffer passes more bytes on without keeping them
                self.written = bytes(data[: n[-1]])
            raise
        return n[-1]

    @staticmethod
    def can_sync():
        """Reports whether the caller may read from CONTROL: only the main thread, only during a run, and not a forked child.

        So if another thread shows a value, what it prints after that can arrive first. The same holds for a signal handler that
        runs while the main thread waits in sync, because that reads the answers.
        """
        return running and get_ident() == main_thread and not Raw.waiting

    @staticmethod
    def sync():
        """Returns once the portal has read and served everything that was printed and sent before."""
        try:
            Raw.waiting = True
            Raw.count = (Raw.count + 1) % 256
            send(SYNC, bytes([Raw.count]))
            # Skip answers to earlier syncs, which were cut short by an interrupt.
            while (answer := read(CONTROL, 1)) and answer[0] != Raw.count:
                pass
        finally:
            Raw.waiting = False


class Buffer(io.BufferedWriter):
    """The buffer of a stream. Code may close it, or a wrapper of its own that closes it, but later code still prints to it."""

    def write(self, data):
        if is_late():
            data = bytes(data)
            send_late(self.fileno(), data)
            return len(data)
        return super().write(data)

    def close(self):
        self.flush()


class Text(io.TextIOWrapper):
    """sys.stdout or sys.stderr."""

    def write(self, text):
        if is_late():
            send_late(self.fileno(), text.encode(self.encoding, self.errors))
            return len(text)
        return super().write(text)


class Input(io.FileIO):
    """Descriptor 0. used says that a stream of it may have input, a position or options that the next run must not get."""

    used = False

    def readinto(self, buffer):
        self.used = True
        return super().readinto(buffer)

    def readall(self):
        self.used = True
        return super().readall()

    def seek(self, *args):
        self.used = True
        return super().seek(*args)


class InputText(io.TextIOWrapper):
    """sys.stdin."""

    @property
    def buffer(self):
        session.streams.input.used = True  # a stream that the code makes from the buffer closes it when it is deleted
        return super().buffer

    def reconfigure(self, **options):
        session.streams.input.used = True
        super().reconfigure(**options)


class Streams:
    """The three standard descriptors and the streams for them. restore undoes what a run has done to them."""

    def __init__(self):
        self.saved = [dup(fd) for fd in range(3)]
        for fd, copy in enumerate(self.saved):
            self.saved[fd] = dup2(copy, 500 + fd, inheritable=False)
            close(copy)
        self.files = [self.file(fd) for fd in self.saved]
        self.output = {}
        self.input = self.stdin = None
        self.restore()

    @staticmethod
    def file(fd):
        status = fstat(fd)
        return status.st_dev, status.st_ino

    def restore(self):
        # First the streams, because those that the code has put there may close a descriptor when they are deleted.
        sys.stdin = sys.__stdin__ = self.stdin
        sys.stdout = sys.__stdout__ = self.output.get("stdout")
        sys.stderr = sys.__stderr__ = self.output.get("stderr")
        for fd, file in enumerate(self.files):
            try:
                same = self.file(fd) == file
            except OSError:
                same = False  # it was closed
            if not same:
                dup2(self.saved[fd], fd)
        for fd, name, errors in (1, "stdout", "strict"), (2, "stderr", "backslashreplace"):
            stream = self.output.get(name)
            if stream is None or not usable(stream):
                stream = Text(Buffer(Raw(fd, "w", closefd=False)), "utf-8", errors, line_buffering=True)
                self.output[name] = stream
                setattr(sys, name, stream)
                setattr(sys, "__" + name + "__", stream)

    def renew_stdin(self):
        """Makes sys.stdin a stream without the buffer of an earlier run. A new stream takes time, so it is only made if necessary."""
        if self.stdin is None or self.input.used or vars(self.stdin) or not usable(self.stdin):
            self.input = Input(0, "r", closefd=False)
            self.stdin = InputText(io.BufferedReader(self.input), "utf-8")
        sys.stdin = sys.__stdin__ = self.stdin


def usable(stream):
    try:
        return not stream.closed
    except ValueError:
        return False  # its buffer was detached


class Session:
    def __init__(self, streams):
        self.streams = streams
        self.module = type(sys)("__main__")
        self.module.__builtins__ = builtins
        self.flags = _ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        self.loop = None  # the event loop of all runs, once one needs it
        self.task = None  # the run in progress, if it is a task of the loop
        self.inside = False  # the code in progress believes that the loop runs, although this file does not run it
        self.sources = {}
        self.with_results = False
        self.previous_directory = None
        sys.modules["__main__"] = self.module
        self.module.__dict__.update(display=self.display, __line__=run_line)

    def run(self, flags, options, source):
        """Executes source and returns its exit code. Sends or prints the exception that it raised, if any."""
        global running, interruptible, run_number
        run_number += 1
        current_run.set(run_number)
        self.with_results = flags & WITH_RESULTS
        Raw.waiting = False
        flush("stdout")  # what threads and tasks have printed since the last run
        flush("stderr")
        running = True
        directory, *entries = options.split("\0")
        entries = dict(entry.split("=", 1) for entry in entries)
        previous = {name: environ.get(name) for name in entries}
        previous_directory = None
        self.streams.renew_stdin()
        sys.displayhook = self.display_hook
        attempt("prepare pools of threads", keep_run_of_pools)
        # Show a warning again that an earlier run has caused.
        self.module.__dict__.pop("__warningregistry__", None)
        getattr(_warnings, "_filters_mutated", getattr(_warnings, "_filters_mutated_lock_held", int))()
        try:
            try:
                _signal.signal(_signal.SIGINT, on_interrupt)
                interruptible = True
                if flags & WITH_BEGUN:
                    send(BEGUN)
                for entry, value in entries.items():
                    environ[entry] = value
                if directory:
                    previous_directory = os.open(".", os.O_PATH)
                    chdir(directory)
                self.execute(source)
            finally:
                interruptible = False
            return 0
        except SystemExit as e:
            return self.exit_code(e)
        except BaseException as e:
            attempt("print the exception of the run", self.report, e)
            return 1
        finally:
            # Figures belong to the run even if it failed.
            attempt("show the figures at the end of the run", self.show_figures)
            # The code may have replaced sys.stdout and sys.stderr by streams with a buffer.
            flush("stdout")
            flush("stderr")
            self.streams.restore()
            flush("stdout")
            flush("stderr")
            for name, value in previous.items():
                if value is None:
                    environ.pop(name, None)
                else:
                    environ[name] = value
            if previous_directory is not None:
                attempt("return to the previous directory at the end of the run", chdir, previous_directory)
                close(previous_directory)
            running = False
            if flags & REHEARSAL:
                run_number = 0
                self.sources.clear()
                vars(builtins).pop("_", None)

    def exit_code(self, e):
        code = self.asked = 1
        attempt("read the exit code", lambda: setattr(self, "asked", e.code))
        if self.asked is None or isinstance(self.asked, int):
            code = int(self.asked or 0)
            code = code & 0xFF if abs(code) < 1 << 31 else 0xFF
        else:
            attempt("print the exit message", print, self.asked, file=sys.stderr)
        if code and self.with_results:
            error = {"name": "SystemExit", "value": text_of(self.asked), "traceback": ""}
            attempt("report the exit", send_json, ERROR, error)
        return code

    asked = None  # the exit code that the last exit asked for

    def execute(self, source):
        """Executes source. If it ends with an expression, passes its value to sys.displayhook."""
        source = source.lstrip("\ufeff")
        name = self.remember(source)
        if "asyncio" in source:
            import asyncio  # noqa: F401
        tree = self.parse(source, name)
        last = []
        if tree.body and isinstance(tree.body[-1], _ast.Expr):
            last = [tree.body.pop()]
        if tree.body:
            self.evaluate(self.compile(tree, name, "exec"))
        if last:
            mode = "exec" if ends_with_semicolon(last[0], source) else "single"
            tree = _ast.Interactive(last) if mode == "single" else _ast.Module(last, [])
            self.evaluate(self.compile(tree, name, mode))

    def parse(self, source, name):
        """Returns the syntax tree of source, which may be indented and have lines with !commands and %magics."""
        try:
            return self.tree(source, name)
        except SyntaxError as e:
            first = e
        lines = source.split("\n")
        indented = isinstance(first, IndentationError) and next((s for s in lines if s.strip()), "")[:1] in (" ", "\t")
        if indented:
            lines.insert(0, "if 1:")
        e = first
        for _ in range(len(lines) + 1):
            try:
                tree = self.tree("\n".join(lines), name)
            except SyntaxError as again:
                e = again
            else:
                if indented:
                    import ast

                    if tree.body[0].orelse:  # the code continued the line that was added
                        break
                    tree.body = tree.body[0].body + tree.body[1:]
                    ast.increment_lineno(tree, -1)
                return tree
            at = (e.lineno or 0) - 1
            call = translate(lines[at]) if 0 <= at < len(lines) else None
            if call is None:
                break
            lines[at] = call
        raise first

    def tree(self, source, name):
        return compile(source, name, "exec", self.flags | _ast.PyCF_ONLY_AST, True)

    def compile(self, tree, name, mode):
        code = compile(tree, name, mode, self.flags, True)
        self.flags |= code.co_flags & CO_FUTURES
        return code

    def evaluate(self, code):
        if not code.co_flags & CO_COROUTINE:
            self.enter_loop()
            try:
                eval(code, self.module.__dict__)
            finally:
                self.leave_loop()
            return
        import asyncio

        self.start_loop()
        self.task = self.loop.create_task(eval(code, self.module.__dict__))
        try:
            self.loop.run_until_complete(self.task)
        except asyncio.CancelledError as e:
            if self.interrupted:
                raise KeyboardInterrupt().with_traceback(e.__traceback__) from None
            raise
        except KeyboardInterrupt:
            self.task.cancel()
            self.loop.run_until_complete(asyncio.gather(self.task, return_exceptions=True))
            raise
        finally:
            self.task = None
            self.interrupted = False

    # The event loop. It runs during runs with await and between runs. While other code runs, the loop appears to be running
    # to asyncio.create_task, so that it can create tasks, but not to asyncio.run, so that it can run a loop of its own.

    interrupted = False

    def start_loop(self):
        """Makes sure that there is an event loop."""
        import asyncio

        events = asyncio.events
        if events._get_running_loop != self.running_loop:
            self.get_running, self.set_running = events._get_running_loop, events._set_running_loop
            events._get_running_loop, events._set_running_loop = self.running_loop, self.set_running_loop
        if self.loop is None or self.loop.is_closed():
            self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)

    def running_loop(self):
        return None if self.inside and get_ident() == main_thread else self.get_running()

    def set_running_loop(self, loop):
        if get_ident() == main_thread:
            if loop is None and self.outside:
                self.inside, loop = True, self.loop
            else:
                self.inside = False
        self.set_running(loop)

    outside = False  # code runs that is not a task of the loop

    def enter_loop(self):
        if "asyncio" in sys.modules:
            self.start_loop()
        if self.loop is not None:
            self.outside = self.inside = True
            self.set_running(self.loop)

    def leave_loop(self):
        if self.outside:
            self.outside = self.inside = False
            self.set_running(None)

    def wait(self):
        """Waits for the next run. Meanwhile the loop runs the tasks of earlier runs."""
        if self.loop is None or self.loop.is_closed():
            return
        try:
            self.loop.add_reader(RUNS, self.loop.stop)
            self.loop.run_forever()
            self.loop.remove_reader(RUNS)
        except BaseException as e:
            # A task has raised SystemExit, or the code has closed the loop's descriptors.
            attempt("run tasks", self.show, e)
            self.loop = None

    def remember(self, source):
        """Stores source for tracebacks and returns the file name for it."""
        name = f"<python-input-{run_number}>"
        self.sources[name] = len(source), None, [s + "\n" for s in source.split("\n")], name
        stale = f"<python-input-{run_number - MAX_SOURCES}>"
        self.sources.pop(stale, None)
        if "linecache" in sys.modules:
            sys.modules["linecache"].cache.pop(stale, None)
        # Importing linecache is slow. Code that imports nothing cannot inspect tracebacks, so it does not need linecache.
        if "linecache" in sys.modules or "import" in source:
            self.publish()
        return name

    def publish(self):
        """Makes the stored sources available to tracebacks."""
        import linecache

        linecache.cache.update(self.sources)

    def report(self, e):
        """Sends e to the portal if the run has results, and prints it otherwise."""
        if not self.with_results:
            self.show(e)
            return
        import traceback

        self.publish()
        text = "".join(traceback.format_exception(type(e), e, self.trim(e)))
        send_json(ERROR, {"name": type(e).__name__, "value": text_of(e), "traceback": text})

    def trim(self, e):
        """Removes the frames of this file from the traceback of e and returns the traceback."""
        tb = e.__traceback__
        while tb and tb.tb_frame.f_code.co_filename not in self.sources:
            tb = tb.tb_next
        last, frame = tb, tb
        while frame:
            following = frame.tb_next
            if frame.tb_frame.f_code.co_filename != FILE_NAME:
                if frame is not last:
                    last.tb_next = frame
                last = frame
            frame = following
        if last:
            last.tb_next = None
        e.__traceback__ = tb
        sys.last_type, sys.last_value, sys.last_traceback = type(e), e, tb
        return tb

    def show(self, e):
        """Prints e as the interpreter does, without the frames of this file."""
        tb = self.trim(e)
        if sys.excepthook is not sys.__excepthook__:
            sys.excepthook(type(e), e, tb)
            return
        import traceback

        self.publish()
        traceback.print_exception(type(e), e, tb)

    # Results

    def display_hook(self, value):
        if value is None:
            return
        builtins._ = None
        self.show_value(value, True)
        builtins._ = value

    def display(self, *values, raw=False, **options):
        """Shows values as results of the run. With raw, they are dicts by MIME type. Other options of notebooks are ignored."""
        for value in values:
            self.show_value(value, False, raw)

    def show_value(self, value, is_main, raw=False):
        if self.with_results and not is_late():
            data = valid_formats(dict(value) if raw else representations(value))
            send_json(RESULT, {"data": data, "is_main": is_main})
        else:
            print(repr(value))

    def show_figures(self):
        """Shows and closes the open figures of matplotlib, as notebooks do at the end of a cell."""
        pyplot = sys.modules.get("matplotlib.pyplot")
        for number in pyplot.get_fignums() if pyplot else ():
            self.show_value(pyplot.figure(number), False)
            pyplot.close(number)


TYPES = {
    "text/html": "_repr_html_",
    "text/markdown": "_repr_markdown_",
    "image/svg+xml": "_repr_svg_",
    "image/png": "_repr_png_",
    "image/jpeg": "_repr_jpeg_",
    "application/pdf": "_repr_pdf_",
    "text/latex": "_repr_latex_",
    "application/json": "_repr_json_",
    "application/javascript": "_repr_javascript_",
}
MAX_DATA_ROWS = 10000


def representations(value):
    """Returns the representations of a value, by MIME type, as IPython's protocol for rich display defines them."""
    data = {}
    # An object that has every attribute has no representations.
    if not isinstance(value, type) and call_method(value, "_msb_method_that_does_not_exist_") is None:
        found = call_method(value, "_repr_mimebundle_")
        found = found[0] if isinstance(found, tuple) else found
        if isinstance(found, dict):
            data.update(found)
        for kind, method in TYPES.items():
            if kind not in data:
                found = call_method(value, method)
                if found is not None:
                    data[kind] = found[0] if isinstance(found, tuple) else found
        module = type(value).__module__.partition(".")[0]
        if module == "matplotlib" and "image/png" not in data and hasattr(value, "savefig"):
            png = io.BytesIO()
            value.savefig(png, format="png", bbox_inches="tight")
            data["image/png"] = png.getvalue()
        if module == "pandas" and type(value).__name__ == "DataFrame" and len(value) <= MAX_DATA_ROWS:
            import json

            columns = json.loads(value.to_json(orient="split", date_format="iso"))
            data["application/vnd.dataframe+json"] = {
                str(name): [row[i] for row in columns["data"]] for i, name in enumerate(columns["columns"])
            }
    data.setdefault("text/plain", repr(value))
    return data


def valid_formats(data):
    """Returns the entries of data that can be sent. Bytes become base64."""
    valid = {}
    for kind, found in data.items():
        if isinstance(found, (bytes, bytearray)):
            import binascii

            valid[kind] = binascii.b2a_base64(found, newline=False).decode()
        elif isinstance(found, str):
            valid[kind] = found
        elif kind.endswith("json"):
            import json

            try:
                json.dumps(found, allow_nan=False)
                valid[kind] = found
            except (TypeError, ValueError, RecursionError):
                pass
    return valid


def text_of(value):
    """Returns str(value), or what to show instead if that fails."""
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__name__} that cannot be printed>"


def ends_with_semicolon(statement, source):
    """Reports whether a semicolon follows the last statement of source. As in notebooks, its value is then not shown."""
    lines = source.split("\n")
    if statement.end_lineno > len(lines):
        return False
    return lines[statement.end_lineno - 1].encode()[statement.end_col_offset :].lstrip().startswith(b";")


def call_method(value, name):
    """Returns the result of a method of rich display, or None if value has none or it fails."""
    try:
        method = getattr(value, name, None)
        return method() if callable(method) else None
    except Exception:
        return None


# Lines that are not Python: !command and %magic


def translate(line):
    """Returns a call for a line that begins with ! or %, or None if it does not."""
    text = line.strip()
    if text[:1] not in ("!", "%") or len(text) == 1:
        return None
    indent = line[: len(line) - len(line.lstrip())]
    return f"{indent}__line__({text!r}, {{**globals(), **locals()}})"


class UsageError(Exception):
    """A magic that this REPL does not have."""


def run_line(text, names):
    """Runs a line that begins with ! or %. names are the variables that it may use as {name}."""
    if text[0] == "!":
        return shell(text[1:], names)
    name, _, rest = text[1:].partition(" ")
    if name == "pip":
        import importlib
        import shlex

        shell(f"{shlex.quote(sys.executable)} -m pip {rest}", names)
        return importlib.invalidate_caches()
    if name == "cd":
        return change_directory(rest.strip().strip("'\""))
    if name != "matplotlib":  # figures are always shown at the end of a run
        raise UsageError(f"%{name} is not available: this is Python without IPython. %pip, %cd and !command are")


def shell(command, names):
    import re
    import subprocess

    def value(match):
        return str(names[match[1]]) if match[1] in names else match[0]

    session.module.__dict__["_exit_code"] = subprocess.call(re.sub(r"(?<!\$)\{(\w+)\}", value, command), shell=True)


last_directory = None


def change_directory(name):
    global last_directory
    here = os.getcwd()
    chdir((last_directory or here) if name == "-" else os.path.expanduser(name or "~"))
    last_directory = here
    print(os.getcwd())


# Figures of matplotlib


class Figures:
    """Finds no module, but prepares matplotlib when its pyplot is imported, so that pyplot.show shows results of the run."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "matplotlib.pyplot" and "MPLBACKEND" not in environ and "matplotlib" in sys.modules:
            sys.modules["msb_figures"] = module = type(sys)("msb_figures")
            exec("from matplotlib.backends.backend_agg import FigureCanvasAgg as FigureCanvas", module.__dict__)
            module.show = lambda *args, **kwargs: session.show_figures()
            sys.modules["matplotlib"].rcParams["backend"] = "module://msb_figures"


def attempt(what, f, *args, **kwargs):
    """Calls f, which may run the user's code, and reports its exception on descriptor 2."""
    global interruptible
    try:
        try:
            interruptible = running
            f(*args, **kwargs)
        finally:
            interruptible = False
    except BaseException as e:
        write(2, f"could not {what}: {type(e).__name__}\n".encode())


def flush(name):
    """Flushes sys.stdout or sys.stderr, which the code may have closed or replaced by anything."""
    try:
        getattr(sys, name).flush()
    except BaseException:
        pass


def on_interrupt(signum, frame):
    if not interruptible:
        return
    # If the run's task waits, cancel it: an exception here would hit another task, or the loop itself.
    task = session.task
    if task and not task.done() and not session.interrupted:
        import asyncio

        if asyncio.current_task(session.loop) is not task:
            session.interrupted = True
            session.loop.call_soon_threadsafe(task.cancel)
            return
    raise KeyboardInterrupt


def in_forked_child():
    global running, forked
    running, forked = False, True
    close(RUNS)
    close(CONTROL)
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)


def keep_run_of_threads():
    """Makes new threads belong to the run that starts them."""

    def start_new_thread(function, args, kwargs=None):
        return start(_contextvars.copy_context().run, (function, *args), kwargs or {})

    start, _thread.start_new_thread = _thread.start_new_thread, start_new_thread
    names = ["start_new_thread"]
    if hasattr(_thread, "start_joinable_thread"):

        def start_joinable_thread(function, **kwargs):
            run = _contextvars.copy_context().run
            return start_joinable(lambda: run(function), **kwargs)

        start_joinable, _thread.start_joinable_thread = _thread.start_joinable_thread, start_joinable_thread
        names.append("start_joinable_thread")
    if "threading" in sys.modules:  # something at the start of the interpreter has imported it
        for name in names:
            setattr(sys.modules["threading"], "_" + name, getattr(_thread, name))


def keep_run_of_pools():
    """Makes what is submitted to a pool of threads belong to the run that submits it."""
    module = sys.modules.get("concurrent.futures.thread")
    if module is None or hasattr(module.ThreadPoolExecutor, "_msb_submit"):
        return

    def call(number, function, args, kwargs):
        token = current_run.set(number)
        try:
            return function(*args, **kwargs)
        finally:
            current_run.reset(token)

    def submit_in_run(self, function, /, *args, **kwargs):
        return submit(self, call, current_run.get(run_number), function, args, kwargs)

    submit = module.ThreadPoolExecutor._msb_submit = module.ThreadPoolExecutor.submit
    module.ThreadPoolExecutor.submit = submit_in_run


def read_text():
    return read_exactly(int.from_bytes(read_exactly(4), "big")).decode()


received = b""  # what was read from RUNS and not yet used; it is empty between runs


def read_exactly(n):
    global received
    while len(received) < n:
        piece = read(RUNS, max(n - len(received), MAX_PIECE))
        if not piece:
            sys.exit()
        received += piece
    data, received = received[:n], received[n:]
    return data


def main():
    global session, session_token, run_token
    for fd, to in (3, RUNS), (4, CONTROL):
        dup2(fd, to, inheritable=False)
        close(fd)
    os.register_at_fork(after_in_child=in_forked_child)
    keep_run_of_threads()
    sys.meta_path.insert(0, Figures)
    sys.argv = [""]
    session_token = read_exactly(TOKEN_SIZE)
    session = Session(Streams())
    send(READY, token=session_token)
    while True:
        session.wait()
        run_token = read_exactly(TOKEN_SIZE)
        flags = read_exactly(1)[0]
        options = read_text()
        code = session.run(flags, options, read_text())
        if getpid() != main_pid:
            os._exit(code)  # this is a child that the code forked
        send(END, bytes([code]))


main()
