// The Node REPL of msb-portal. It reads runs from descriptor 3, evaluates them in the global context
// and reports on descriptor 4. repl.go describes the protocol. It runs as `node -e`, so Node's
// built-in modules are globals, as in Node's REPL.
'use strict';
{
  const fs = require('node:fs');
  const net = require('node:net');
  const util = require('node:util');
  const vm = require('node:vm');
  const { Writable } = require('node:stream');
  const { createRequire } = require('node:module');

  const RUNS = 3, CONTROL = 4;
  const READY = 'r', OK = '+', FAILED = '-', SYNC = 0x80;

  let running = false;
  const { env } = process;
  let stdin = null; // process.stdin of the run in progress, once it is used
  let failRun = null; // ends the run in progress with an error
  let count = 0;

  function writeAll(fd, data) {
    for (let at = 0; at < data.length;) {
      try {
        at += fs.writeSync(fd, data, at);
      } catch (e) {
        if (e.code !== 'EAGAIN') throw e;
        // The pipe is full, and a child process has made it non-blocking.
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1);
      }
    }
  }

  let lastStream = 1;
  let token = SYNC;
  const answer = Buffer.alloc(1);

  // sync returns once the portal has read everything that was printed before.
  function sync() {
    token = SYNC | (token + 1) % SYNC;
    fs.writeSync(CONTROL, Buffer.of(token));
    // Skip answers to earlier syncs, which were cut short by an interrupt.
    while (fs.readSync(CONTROL, answer) === 1 && answer[0] !== token);
  }

  // Stream is descriptor 1 or 2. A write first waits until the portal has read what the other stream
  // wrote. It does not use Writable's buffer, because an interrupt could leave it inconsistent.
  class Stream extends Writable {
    constructor(fd) {
      super();
      this.fd = fd;
    }
    write(chunk, encoding, done) {
      if (typeof encoding === 'function') [encoding, done] = [undefined, encoding];
      const data = typeof chunk === 'string' ? Buffer.from(chunk, encoding) : chunk;
      if (this.fd !== lastStream && running) {
        sync();
        lastStream = this.fd;
      }
      writeAll(this.fd, data);
      if (done) process.nextTick(done);
      return true;
    }
    // Code may end stdout, but later code must still be able to print to it.
    end(chunk, encoding, done) {
      if (typeof chunk === 'function') [chunk, done] = [undefined, chunk];
      if (chunk !== undefined && chunk !== null) this.write(chunk, encoding, done);
      else if (done) process.nextTick(done);
      return this;
    }
    destroy() { return this; }
  }

  // Exit is thrown by process.exit. It ends the run but not the session.
  class Exit extends Error {}

  let evalWithAwait = null;

  // replEval evaluates code with Node's own REPL, which supports import and keeps the declarations of
  // code with top-level await. It is slow to load.
  function replEval(code, name) {
    if (!evalWithAwait) {
      // Node's REPL catches errors in a domain. Replace the domain so that errors reach the caller.
      const domain = require('node:domain');
      const { create } = domain;
      domain.create = () => Object.assign(new (require('node:events'))(), {
        bind: (f) => f, run: (f) => f(), enter() {}, exit() {}, add() {},
      });
      const idle = new (require('node:stream').Duplex)({ read() {}, write(c, e, done) { done(); } });
      const server = require('node:repl').start({
        input: idle, output: idle, terminal: false, useGlobal: true, prompt: '', breakEvalOnSigint: true,
      });
      domain.create = create;
      evalWithAwait = (...args) => server.eval(...args);
    }
    return new Promise((resolve, reject) => {
      evalWithAwait(code, globalThis, name, (err, value) => (err ? reject(err.err ?? err) : resolve(value)));
      // Node's REPL has removed our SIGINT handler.
      process.removeListener('SIGINT', onInterrupt);
      process.on('SIGINT', onInterrupt);
    });
  }

  function evaluate(code, name) {
    if (/\b(await|import)\b/.test(code)) return replEval(code, name);
    const options = { filename: name };
    let script;
    // Like Node's REPL, take `{ a: 1 }` for an object, not for a block.
    if (/^\s*\{/.test(code) && !/;\s*$/.test(code)) {
      try {
        script = new vm.Script(`(${code.trim()})\n`, options);
      } catch {
        // Not an object: compile it as a block below.
      }
    }
    script ??= new vm.Script(code, options);
    return script.runInThisContext({ breakOnSigint: true, displayErrors: false });
  }

  // show prints an error as Node's REPL does, without the frames of Node itself and of this file.
  function show(err) {
    let text = null;
    if (util.types.isNativeError(err) && typeof err.stack === 'string') {
      const lines = err.stack.split('\n');
      const own = lines.findIndex((line) => /^ +at .*(\(node:vm:|\(?node:repl|\[eval\])/.test(line));
      if (own >= 0) {
        err.stack = lines.slice(0, own).join('\n');
        // Code that did not compile has no frames left. Print the position, if known, and the message.
        if (!/^ +at /m.test(err.stack)) text = err.stack.replace(/^\w*Error\b/m, 'Uncaught $&');
      }
    }
    process.stderr.write(`${text ?? `Uncaught ${util.inspect(err)}`}\n`);
  }

  const INTERRUPTED = 'ERR_SCRIPT_EXECUTION_INTERRUPTED'; // Node's own error code

  function onInterrupt() {
    failRun?.(Object.assign(new Error('Script execution was interrupted by `SIGINT`'), { code: INTERRUPTED }));
  }

  const pause = new vm.Script('Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 20)');

  // takeInterrupts waits for a second interrupt that the portal may have sent, so that it does not hit a
  // later run. Node may also remember one of two interrupts until a script runs long enough to be
  // interrupted, so run one that only waits.
  async function takeInterrupts() {
    await new Promise((done) => setTimeout(done, 10));
    for (let i = 0; i < 3; i++) {
      try {
        pause.runInThisContext({ breakOnSigint: true });
        return;
      } catch {
        // It was interrupted.
      }
    }
  }

  // run evaluates code, prints its error if it threw one, and returns whether it succeeded. If the
  // code's value is a promise, as after a last line `main()`, the run ends when the promise settles.
  // An endless loop after an await cannot be interrupted: Node handles SIGINT in running code only
  // until the code first waits.
  async function run(options, code) {
    const name = `REPL${++count}`;
    const [directory, ...entries] = options.split('\0');
    const previous = {};
    let previousDirectory = null;
    stdin?.destroy();
    stdin = null;
    running = true;
    const failed = new Promise((resolve, reject) => { failRun = reject; });
    failed.catch(() => {});
    try {
      for (const entry of entries) {
        const [, key, value] = /^([^=]*)=([^]*)$/.exec(entry);
        if (!Object.hasOwn(previous, key)) previous[key] = env[key];
        env[key] = value;
      }
      if (directory) {
        previousDirectory = process.cwd();
        process.chdir(directory);
      }
      const value = await Promise.race([(async () => evaluate(code, name))(), failed]);
      if (value !== undefined) process.stdout.write(`${util.inspect(value)}\n`);
      // Node reports unhandled rejections in the next turn of the event loop.
      await Promise.race([new Promise(setImmediate), failed]);
      return true;
    } catch (err) {
      failRun = null;
      if (err instanceof Exit) return err.code === 0;
      if (err?.code === INTERRUPTED) await takeInterrupts();
      try {
        show(err);
      } catch {
        writeAll(2, Buffer.from('could not print the error that the code threw\n'));
      }
      return false;
    } finally {
      failRun = null;
      running = false;
      for (const [key, value] of Object.entries(previous)) {
        if (value === undefined) delete env[key];
        else env[key] = value;
      }
      if (previousDirectory !== null) {
        try {
          process.chdir(previousDirectory);
        } catch {
          writeAll(2, Buffer.from('could not return to the previous directory at the end of the run\n'));
        }
      }
    }
  }

  for (const [name, fd] of [['stdout', 1], ['stderr', 2]]) {
    const stream = new Stream(fd);
    Object.defineProperty(process, name, { configurable: true, enumerable: true, get: () => stream });
  }
  // Each run has an input of its own, so it gets a stream of its own.
  Object.defineProperty(process, 'stdin', {
    configurable: true, enumerable: true,
    get: () => stdin ??= new fs.ReadStream(null, { fd: 0, autoClose: false }),
  });
  process.exit = (code) => {
    const exit = new Exit('process.exit ended the run');
    exit.code = Number(code ?? process.exitCode ?? 0);
    throw exit;
  };
  process.on('SIGINT', onInterrupt);
  process.on('uncaughtException', (err) => {
    if (failRun) failRun(err);
    else if (!(err instanceof Exit)) show(err);
  });
  try {
    process.chdir('.');
  } catch {
    process.chdir('/'); // the user may not enter the working directory of the image
  }
  globalThis.require = createRequire(`${process.cwd()}/`);
  globalThis.module = { exports: {}, require: globalThis.require };
  globalThis.exports = globalThis.module.exports;
  delete globalThis.__filename;
  delete globalThis.__dirname;

  let input = Buffer.alloc(0);
  let tail = Promise.resolve();
  const runs = new net.Socket({ fd: RUNS, writable: false });
  // text returns the string in input that begins at a length at the offset, and where it ends, or undefined if input does
  // not have all of it yet.
  function text(at) {
    if (input.length < at + 4) return undefined;
    const end = at + 4 + input.readUInt32BE(at);
    return input.length < end ? undefined : [input.toString('utf8', at + 4, end), end];
  }
  runs.on('data', (data) => {
    input = Buffer.concat([input, data]);
    for (let options, code; (options = text(0)) && (code = text(options[1])); input = input.subarray(code[1])) {
      const [o, c] = [options[0], code[0]];
      tail = tail.then(() => run(o, c)).then((ok) => fs.writeSync(CONTROL, ok ? OK : FAILED));
    }
  });
  runs.on('end', () => process.reallyExit(0));
  fs.writeSync(CONTROL, READY);
}
