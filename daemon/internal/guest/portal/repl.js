// The Node REPL of msb-portal. It reads runs from one socket, evaluates them in the global context and reports on another.
// session.go describes the protocol. It runs as `node -e`, so Node's built-in modules are globals, as in Node's REPL. The loader
// calls this function.
//
// The code of the runs shares this realm. So this file takes what it needs from Node at the start, and uses nothing later that
// the code may replace.
'use strict';
(dynamicImport) => {
  const fs = require('node:fs');
  const net = require('node:net');
  const util = require('node:util');
  const vm = require('node:vm');
  const { AsyncLocalStorage } = require('node:async_hooks');
  const { Writable } = require('node:stream');
  const nodeModule = require('node:module');
  const { writeSync, readSync, ReadStream } = fs;
  const { Script, compileFunction, constants } = vm;
  const { inspect, types } = util;
  const {
    process, setImmediate, setTimeout, Promise, Error, SyntaxError, Buffer, JSON, Object, Array, Number, String, Symbol, Atomics, Int32Array,
    SharedArrayBuffer, Uint8Array, Set, Reflect, parseInt,
  } = globalThis;

  const { env, nextTick, cwd, chdir } = process;

  const RUNS = 3, CONTROL = 4, INTERRUPTS = 5;
  const READY = 'r', BEGUN = 'b', END = '.', ERROR = 'e', RESULT = 'd', LATE = 'l', SYNC = 's', INTERRUPT = 'i';
  const MAX_PIECE = 60000; // bytes of a message
  const FIRST = 2; // a flag of a piece
  const WITH_RESULTS = 1, WITH_BEGUN = 2, REHEARSAL = 4; // flags of a run

  const token = { session: Buffer.alloc(0), run: Buffer.alloc(0) };
  const version = parseInt(process.versions.node);
  // The number of the run to which what executes belongs, kept across callbacks and promises.
  // Before Node 24, AsyncLocalStorage uses hooks, which leave Node in disorder when code is terminated.
  const currentRun = version >= 24 ? new AsyncLocalStorage() : { getStore() {}, run: (n, f) => f() };
  let runNumber = 0;
  let running = false;
  let withResults = false;
  let synchronous = false; // code of the run in progress is below evaluate
  let endRun = null; // ends the run in progress, once it waits, with an outcome
  let exitCode = null; // of the run in progress, if it called process.exit
  let stdin = null; // process.stdin of the run in progress, once it is used

  // send sends a message to the portal.
  function send(kind, data = Buffer.alloc(0), with_ = token.run) {
    writeSync(CONTROL, Buffer.concat([with_, Buffer.from(kind), data]));
  }

  // sendJSON sends an object in pieces. The first byte of each has a flag for the first one and one for the last one.
  function sendJSON(kind, value) {
    let data = Buffer.from(JSON.stringify(value));
    let first = FIRST;
    do {
      send(kind, Buffer.concat([Buffer.of(first | (data.length <= MAX_PIECE ? 1 : 0)), data.subarray(0, MAX_PIECE)]));
      data = data.subarray(MAX_PIECE);
      first = 0;
    } while (data.length > 0);
    sync(); // so that what is printed from now on comes after it
  }

  // isLate reports whether the caller belongs to a run that has ended.
  const isLate = () => !running || (currentRun.getStore() ?? runNumber) !== runNumber;

  function writeAll(fd, data) {
    for (let at = 0; at < data.length;) {
      try {
        at += writeSync(fd, data, at);
      } catch (e) {
        if (e.code !== 'EAGAIN') throw e;
        // The pipe is full, and a child process has made it non-blocking.
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1);
      }
    }
  }

  let lastStream = 1;
  let syncs = 0;
  const answer = Buffer.alloc(1);

  // sync returns once the portal has read and served everything that was printed and sent before.
  function sync() {
    syncs = (syncs + 1) % 256;
    send(SYNC, Buffer.of(syncs));
    // Skip answers to earlier syncs, which were cut short by an interrupt.
    while (readSync(CONTROL, answer) === 1 && answer[0] !== syncs);
  }

  // print prints to descriptor 1 or 2. It first waits until the portal has read what the other stream wrote.
  function print(fd, data) {
    if (isLate()) {
      for (let at = 0; at < data.length; at += MAX_PIECE) {
        send(LATE, Buffer.concat([Buffer.of(fd), data.subarray(at, at + MAX_PIECE)]), token.session);
      }
      return;
    }
    if (fd !== lastStream) {
      sync();
      lastStream = fd;
    }
    writeAll(fd, data);
  }

  // Stream is process.stdout or process.stderr. It does not use Writable's buffer, because an interrupt could leave it
  // inconsistent.
  class Stream extends Writable {
    constructor(fd) {
      super({ autoDestroy: false, emitClose: false });
      this.fd = fd;
    }
    write(chunk, encoding, done) {
      if (typeof encoding === 'function') [encoding, done] = [undefined, encoding];
      print(this.fd, typeof chunk === 'string' ? Buffer.from(chunk, encoding) : chunk);
      if (done) nextTick(done);
      return true;
    }
    // Code may end stdout, but later code must still be able to print to it.
    end(chunk, encoding, done) {
      if (typeof chunk === 'function') [chunk, done] = [undefined, chunk];
      if (chunk !== undefined && chunk !== null) this.write(chunk, encoding, done);
      else if (done) nextTick(done);
      nextTick(() => this.emit('finish')); // for what has piped into it
      return this;
    }
    destroy() { return this; }
  }

  // The code of a run becomes a script. Its top-level declarations become properties of the global object, so that a later run
  // can declare the same names again, whatever has become of them. Code that awaits becomes an async function.

  const SYNTAX = { ecmaVersion: 'latest', allowAwaitOutsideFunction: true, allowHashBang: true, allowImportExportEverywhere: true };
  let parser = null;

  // acorn returns the parser that Node's own REPL uses.
  function acorn() {
    if (!parser) {
      const source = process.binding('natives')['internal/deps/acorn/acorn/dist/acorn'];
      const module = { exports: {} };
      compileFunction(source, ['exports', 'module'])(module.exports, module);
      parser = module.exports;
    }
    return parser;
  }

  const parse = (code) => acorn().parse(code, SYNTAX);

  // children returns the nodes directly below a node.
  function* children(node) {
    for (const value of Object.values(node)) {
      for (const child of Array.isArray(value) ? value : [value]) if (typeof child?.type === 'string') yield child;
    }
  }

  const isFunction = (node) => /Function|^MethodDefinition$|^PropertyDefinition$|^StaticBlock$/.test(node.type);

  // awaits reports whether a node has an await outside of functions.
  function awaits(node) {
    if (node.type === 'AwaitExpression' || node.type === 'ForOfStatement' && node.await) return true;
    if (node.type === 'MethodDefinition' || node.type === 'PropertyDefinition') return node.computed && awaits(node.key);
    if (isFunction(node)) return false;
    for (const child of children(node)) if (awaits(child)) return true;
    return false;
  }

  // names yields the names that a pattern binds.
  function* names(pattern) {
    switch (pattern?.type) {
      case 'Identifier': yield pattern.name; break;
      case 'ObjectPattern': for (const p of pattern.properties) yield* names(p.value ?? p.argument); break;
      case 'ArrayPattern': for (const p of pattern.elements) yield* names(p); break;
      case 'AssignmentPattern': yield* names(pattern.left); break;
      case 'RestElement': yield* names(pattern.argument); break;
    }
  }

  // translate returns the script for code, and the names that it declares.
  function translate(code) {
    const tree = parse(code);
    const isAsync = tree.body.some((node) => /^Import/.test(node.type) || awaits(node));
    const declared = new Set();
    const edits = []; // of code: [start, end, text]
    let prefix = '';
    const replace = (start, end, text) => edits.push([start, end, text]);

    // assign turns a declaration into assignments.
    function assign(node, isStatement) {
      const open = isStatement ? ';(' : '';
      const firsts = node.declarations.filter((d) => d.init || node.kind !== 'var' || !isStatement);
      if (firsts.length === 0) return replace(node.start, node.end, ';');
      replace(node.start, node.declarations[0].start, open);
      for (const d of node.declarations) {
        for (const name of names(d.id)) declared.add(name);
        if (!d.init && isStatement) replace(d.end, d.end, node.kind === 'var' ? '' : ' = void 0');
      }
      if (isStatement) replace(node.declarations.at(-1).end, node.end, ');');
    }

    // hoist turns the var declarations below a node into assignments.
    function hoist(node) {
      if (isFunction(node) || /^Class/.test(node.type)) return;
      for (const child of children(node)) {
        if (child.type === 'VariableDeclaration' && child.kind === 'var') {
          assign(child, !(node.type.startsWith('For') && child !== node.body));
        } else {
          hoist(child);
        }
      }
    }

    function statement(node, isLast) {
      switch (node.type) {
        case 'VariableDeclaration':
          if (isAsync) return assign(node, true);
          if (node.kind !== 'let' && node.kind !== 'const') return;
          replace(node.start, node.start + node.kind.length, 'var'.padEnd(node.kind.length)); // keeps the columns
          for (const d of node.declarations) {
            for (const name of names(d.id)) declared.add(name);
            if (!d.init) replace(d.end, d.end, ' = void 0');
          }
          return;
        case 'ClassDeclaration':
          declared.add(node.id.name);
          replace(node.start, node.start, `;(${node.id.name} = `);
          return replace(node.end, node.end, ');void 0;');
        case 'FunctionDeclaration':
          if (isAsync) {
            declared.add(node.id.name);
            prefix += `globalThis.${node.id.name} = ${node.id.name};`;
          }
          return;
        case 'ImportDeclaration': {
          const specifier = node.source.raw;
          const attributes = node.attributes?.length
            ? `, { with: {${node.attributes.map((a) => `${code.slice(a.key.start, a.key.end)}: ${a.value.raw}`)}} }` : '';
          let text = `;{ const __imported = await import(${specifier}${attributes});`;
          for (const s of node.specifiers) {
            const { name } = s.local;
            declared.add(name);
            if (s.type === 'ImportNamespaceSpecifier') {
              text += ` globalThis.${name} = __imported;`;
              continue;
            }
            const imported = JSON.stringify(s.type === 'ImportDefaultSpecifier' ? 'default' : s.imported.name ?? s.imported.value);
            text += ` if (!(${imported} in __imported)) throw new SyntaxError(${JSON.stringify(`The module ${specifier} does not provide an export named ${imported}`)});`;
            text += ` globalThis.${name} = __imported[${imported}];`;
          }
          // Keep the number of lines.
          return replace(node.start, node.end, `${text} }${'\n'.repeat(code.slice(node.start, node.end).split('\n').length - 1)}`);
        }
        case 'ExportNamedDeclaration':
          if (!node.declaration) throw new SyntaxError('export is only possible in a module; this is a REPL');
          replace(node.start, node.declaration.start, '');
          return statement(node.declaration, false);
        case 'ExpressionStatement':
          if (isAsync && isLast) {
            replace(node.start, node.expression.start, ';return (');
            // The parentheses of the expression are not in its range.
            const inner = code.slice(node.start, node.expression.start);
            edits.at(-1)[2] += inner;
            const rest = code.slice(node.expression.end, node.end).replace(/;\s*$/, '');
            replace(node.expression.end, node.end, `${rest});`);
          }
          return;
        default:
          if (isAsync) hoist(node);
      }
    }

    tree.body.forEach((node, i) => statement(node, i === tree.body.length - 1));
    edits.sort(([a, b], [c, d]) => c - a || d - b);
    let text = code;
    for (const [start, end, replacement] of edits) text = text.slice(0, start) + replacement + text.slice(end);
    if (isAsync) text = `(async () => {${prefix}${text}\n})()`;
    return { text, declared };
  }

  // withoutTypes returns TypeScript code without its types, or undefined if this Node cannot remove them.
  function withoutTypes(code) {
    const { stripTypeScriptTypes } = nodeModule;
    if (!stripTypeScriptTypes) return undefined;
    const { emitWarning } = process;
    process.emitWarning = () => {}; // it is experimental
    try {
      try {
        return stripTypeScriptTypes(code);
      } catch {
        return stripTypeScriptTypes(code, { mode: 'transform' });
      }
    } catch {
      return undefined;
    } finally {
      process.emitWarning = emitWarning;
    }
  }

  const options = (filename) => ({
    filename,
    importModuleDynamically: constants?.USE_MAIN_CONTEXT_DEFAULT_LOADER ?? dynamicImport,
  });

  // isObject reports whether code is an expression that begins with an object.
  function isObject(code) {
    if (!/^\s*\{/.test(code)) return false;
    try {
      const { end } = acorn().parseExpressionAt(code, 0, SYNTAX);
      return parse(code.slice(end)).body.length === 0; // only comments follow
    } catch {
      return false; // it is a block
    }
  }

  // compile returns the script for the code of a run. Nothing is executed, so no code runs twice.
  function compile(code, filename) {
    code = code.replace(/^\ufeff/, '');
    // Like Node's REPL, take `{ a: 1 }` for an object, not for a block.
    if (isObject(code)) return compileAs(`(${code}\n)`, filename);
    try {
      return compileAs(code, filename);
    } catch (e) {
      const javascript = withoutTypes(code);
      if (javascript !== undefined && javascript !== code) {
        try {
          return compileAs(javascript, filename);
        } catch {
          // Report the error in the code itself.
        }
      }
      new Script(code, options(filename)); // which reports the place of the error, unless Node finds none
      throw e;
    }
  }

  function compileAs(code, filename) {
    const { text, declared } = translate(code);
    return { script: new Script(text, options(filename)), declared };
  }

  const caller = new Script('__msb_call()');

  // interruptibly calls f, which takes long for much code, so that Node interrupts it.
  function interruptibly(f) {
    globalThis.__msb_call = f;
    try {
      return caller.runInThisContext({ breakOnSigint: true });
    } finally {
      delete globalThis.__msb_call;
    }
  }

  // declare makes sure that the names can be assigned to.
  function declare(declared) {
    for (const name of declared) {
      const property = Object.getOwnPropertyDescriptor(globalThis, name);
      if (!property) globalThis[name] = undefined;
      else if (property.get && !property.set && property.configurable) {
        Object.defineProperty(globalThis, name, { value: undefined, writable: true, configurable: true, enumerable: true });
      }
    }
  }

  function evaluate({ script, declared }) {
    declare(declared);
    synchronous = true;
    try {
      return script.runInThisContext({ breakOnSigint: true, displayErrors: false });
    } finally {
      synchronous = false;
      renewListeners();
    }
  }

  // Interrupts. While code is below evaluate, Node itself interrupts it. While the run waits, the handler below ends it. Code that
  // runs after the run has waited blocks this thread, so another thread terminates it, which the code cannot catch.

  const INTERRUPTED = 'ERR_SCRIPT_EXECUTION_INTERRUPTED'; // Node's own error code
  const interrupted = () => Object.assign(new Error('Script execution was interrupted by `SIGINT`'), { code: INTERRUPTED });
  // Shared with the watch: the number of the run that waits, or 0, and that of the last run whose interrupt this thread has handled.
  const shared = new Int32Array(new SharedArrayBuffer(8));
  const WAITING = 0, HANDLED = 1;
  let watch = null;

  function startWatch() {
    if (watch) return;
    const { Worker } = require('node:worker_threads');
    watch = new Worker(`
      const { workerData: [shared, fd] } = require('node:worker_threads');
      const { Session } = require('node:inspector');
      const session = new Session();
      session.connectToMainThread();
      const number = Buffer.alloc(4);
      function next() {
        if (require('node:fs').readSync(fd, number) !== 4) return;
        const run = Atomics.load(shared, 0);
        // If the event loop runs, the other thread handles the interrupt.
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 300);
        // It may also be an interrupt of an earlier run, which did not wait.
        if (run === number.readInt32LE() && run === Atomics.load(shared, 0) && run !== Atomics.load(shared, 1)) {
          session.post('Runtime.terminateExecution');
        }
        setImmediate(next);
      }
      next();
    `, { eval: true, workerData: [shared, INTERRUPTS], stdout: false, stderr: false });
    watch.unref();
    watch.on('error', () => { watch = null; });
  }

  function isInterrupt(error) {
    try {
      return error?.code === INTERRUPTED;
    } catch {
      return false; // the code threw an object that throws
    }
  }

  // A run with a listener of its own handles the interrupt itself.
  function onInterrupt() {
    Atomics.store(shared, HANDLED, runNumber);
    if (process.listeners('SIGINT').every((listener) => earlierListeners.has(listener))) endRun?.({ error: interrupted() });
  }

  let earlierListeners = new Set(); // for SIGINT, when the run in progress began

  // After a script that has added a listener, SIGINT would kill Node. Listeners that are added again make Node handle it.
  // onInterrupt comes first, because it looks for those of the run, which are removed when they are called if they are for one time.
  function renewListeners() {
    if (process.listeners('SIGINT').every((listener) => earlierListeners.has(listener))) return;
    const listeners = process.rawListeners('SIGINT');
    process.removeAllListeners('SIGINT');
    process.on('SIGINT', onInterrupt);
    for (const listener of listeners) if (listener !== onInterrupt) process.on('SIGINT', listener);
  }

  const pause = new Script('Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 20)');

  // takeInterrupts waits for a second interrupt that the portal may have sent, so that it does not hit a later run. Node may
  // also remember one of two interrupts until a script runs long enough to be interrupted, so run one that only waits.
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

  const nodeListeners = new Set(process.listeners('exit'));

  // exit is process.exit. It ends the run but not the session. The code cannot catch it, and no finally block is executed.
  function exit(code) {
    if (code !== undefined) process.exitCode = code;
    const value = Number(process.exitCode ?? 0);
    for (const listener of process.listeners('exit')) {
      if (nodeListeners.has(listener)) continue;
      try {
        listener.call(process, value);
      } catch (e) {
        report(e);
      }
    }
    process.exitCode = undefined;
    const mine = !isLate();
    if (mine) exitCode = value & 0xff;
    if (mine && synchronous) {
      send(INTERRUPT); // process.kill would run what Node runs at its exit
    } else {
      const end = endRun;
      if (mine) setImmediate(() => end?.({ exit: exitCode }));
      const { Session } = require('node:inspector');
      const session = new Session();
      session.connect();
      session.post('Runtime.terminateExecution');
    }
    for (;;);
  }

  // withoutOwnFrames returns a text without the frames of this file and those below it, in each stack that the text has.
  function withoutOwnFrames(text) {
    let below = false;
    return text.split('\n').filter((line) => {
      if (!/^ +at /.test(line)) below = false;
      else below ||= /^ +at .*(\(node:vm:|\(?node:repl|\[eval\]:)/.test(line);
      return !below;
    }).join('\n');
  }

  // describe returns what Node's REPL prints for an error.
  function describe(err) {
    if (types.isNativeError(err) && typeof err.stack === 'string') {
      err.stack = withoutOwnFrames(err.stack);
      // Code that did not compile has no frames left. Print the position, if known, and the message.
      if (!/^ +at /m.test(err.stack) && err.cause === undefined) return err.stack.replace(/^\w*Error\b/m, 'Uncaught $&');
    }
    return `Uncaught ${withoutOwnFrames(inspect(err))}`;
  }

  function report(err) {
    let text;
    try {
      text = describe(err);
    } catch {
      text = 'could not print the error that the code threw';
    }
    if (!withResults || isLate()) return print(2, Buffer.from(`${text}\n`));
    let name = 'Error', value = '';
    try {
      if (types.isNativeError(err)) [name, value] = [String(err.name), String(err.message)];
      else value = inspect(err);
    } catch {
      // It is an object that cannot be described.
    }
    sendJSON(ERROR, { name, value, traceback: text });
  }

  // Results

  const DISPLAY = Symbol.for('Jupyter.display');

  function sendValue(value, formats, isMain) {
    // The run may have ended while the formats were made.
    if (!withResults || isLate()) return print(1, Buffer.from(`${inspect(value)}\n`));
    const data = { ...formats };
    data['text/plain'] ??= inspect(value);
    for (const [type, found] of Object.entries(data)) {
      if (found instanceof Uint8Array) data[type] = Buffer.from(found).toString('base64');
    }
    sendJSON(RESULT, { data, is_main: isMain });
  }

  // showValue shows a value at once, unless it makes its formats asynchronously. Then it returns a promise.
  function showValue(value, isMain) {
    const formats = withResults && typeof value?.[DISPLAY] === 'function' ? value[DISPLAY]() : {};
    if (typeof formats?.then === 'function') return formats.then((made) => sendValue(value, made, isMain));
    return sendValue(value, formats, isMain);
  }

  async function display(value) { await showValue(value, false); }
  for (const [name, type] of Object.entries({
    html: 'text/html', markdown: 'text/markdown', svg: 'image/svg+xml', png: 'image/png', jpeg: 'image/jpeg', pdf: 'application/pdf',
    latex: 'text/latex', json: 'application/json', javascript: 'application/javascript',
  })) {
    display[name] = (value) => {
      const plain = typeof value === 'string' ? value : inspect(value);
      const shown = type === 'application/json' || value instanceof Uint8Array ? value : String(value);
      return display({ [DISPLAY]: () => ({ [type]: shown, 'text/plain': plain }) });
    };
  }

  // run evaluates code and returns its exit code. It prints or sends its error, if it threw one. If the code's value is a promise,
  // as after a last line `main()`, the run ends when the promise settles.
  async function run(flags, settings, code) {
    runNumber++;
    const [directory, ...entries] = settings.split('\0');
    const previous = {};
    let previousDirectory = null;
    stdin?.destroy();
    stdin = null;
    withResults = (flags & WITH_RESULTS) !== 0;
    exitCode = null;
    running = true;
    if (!process.listeners('SIGINT').includes(onInterrupt)) process.on('SIGINT', onInterrupt);
    earlierListeners = new Set(process.listeners('SIGINT'));
    const ended = new Promise((resolve) => { endRun = resolve; });
    if (flags & WITH_BEGUN) send(BEGUN);
    try {
      for (const entry of entries) {
        const [, key, value] = /^([^=]*)=([^]*)$/.exec(entry);
        if (!Object.hasOwn(previous, key)) previous[key] = env[key];
        env[key] = value;
      }
      if (directory) {
        previousDirectory = cwd();
        chdir(directory);
      }
      const outcome = await currentRun.run(runNumber, () => execute(code, ended));
      endRun = null;
      Atomics.store(shared, WAITING, 0);
      if (exitCode !== null || 'exit' in outcome) {
        if (outcome.error) await takeInterrupts();
        const status = exitCode ?? outcome.exit;
        if (status && withResults) sendJSON(ERROR, { name: 'Exit', value: String(status), traceback: '' });
        return status;
      }
      if ('error' in outcome) {
        if (isInterrupt(outcome.error)) await takeInterrupts();
        report(outcome.error);
        return 1;
      }
      return 0;
    } finally {
      endRun = null;
      running = false;
      if (flags & REHEARSAL) runNumber = 0;
      for (const [key, value] of Object.entries(previous)) {
        if (value === undefined) delete env[key];
        else env[key] = value;
      }
      if (previousDirectory !== null) {
        try {
          chdir(previousDirectory);
        } catch {
          writeAll(2, Buffer.from('could not return to the previous directory at the end of the run\n'));
        }
      }
    }
  }

  // execute evaluates code and shows its value. It returns {}, { error } or { exit }.
  async function execute(code, ended) {
    try {
      let value = evaluate(interruptibly(() => compile(code, `REPL${runNumber}`)));
      if (typeof value?.then === 'function') {
        startWatch();
        Atomics.store(shared, WAITING, runNumber);
        const settled = Promise.resolve(value).then((result) => ({ result }), (error) => ({ error }));
        const outcome = await Promise.race([settled, ended]);
        if (!('result' in outcome)) return outcome;
        value = outcome.result;
      }
      if (value !== undefined) {
        const shown = Promise.resolve(interruptibly(() => showValue(value, true))).then(() => ({}), (error) => ({ error }));
        const outcome = await Promise.race([shown, ended]);
        if ('error' in outcome || 'exit' in outcome) return outcome;
      }
      // Node reports unhandled rejections in the next turn of the event loop.
      return await Promise.race([new Promise((done) => setImmediate(done, {})), ended]);
    } catch (error) {
      return { error };
    }
  }

  for (const [name, fd] of [['stdout', 1], ['stderr', 2]]) {
    const stream = new Stream(fd);
    Object.defineProperty(process, name, { configurable: true, enumerable: true, get: () => stream });
  }
  // Each run has an input of its own, so it gets a stream of its own.
  Object.defineProperty(process, 'stdin', {
    configurable: true, enumerable: true,
    get: () => stdin ??= new ReadStream(null, { fd: 0, autoClose: false }),
  });
  process.exit = exit;
  // Node warns of what compile uses.
  const { emitWarning } = process;
  process.emitWarning = function (warning, ...rest) {
    if (!String(warning).startsWith('vm.USE_MAIN_CONTEXT_DEFAULT_LOADER')) Reflect.apply(emitWarning, this, [warning, ...rest]);
  };
  // A callback instead of a listener, because the code may remove all listeners.
  process.setUncaughtExceptionCaptureCallback((error) => {
    try {
      if (process.listenerCount('uncaughtException') > 0) process.emit('uncaughtException', error, 'uncaughtException');
      else if (endRun && !isLate()) endRun({ error });
      else report(error);
    } catch (e) {
      report(e); // a listener has thrown it
    }
  });
  console.trace = function trace(...args) {
    const shown = { name: 'Trace', message: util.format(...args) };
    Error.captureStackTrace(shown, trace);
    console.error(withoutOwnFrames(shown.stack));
  };
  globalThis.require = nodeModule.createRequire(`${cwd()}/`);
  globalThis.module = { exports: {}, require: globalThis.require };
  globalThis.exports = globalThis.module.exports;
  globalThis.display = display;
  delete globalThis.__filename;
  delete globalThis.__dirname;

  // The socket of the runs carries the session's token, and for each run its token, a byte with flags, and two strings, each after
  // its length.
  const TOKEN_SIZE = 26;
  let input = Buffer.alloc(0);
  let busy = false;
  const runs = new net.Socket({ fd: RUNS, writable: false });

  // text returns the string in input that begins at a length at the offset, and where it ends, or undefined if input does not
  // have all of it yet.
  function text(at) {
    if (input.length < at + 4) return undefined;
    const end = at + 4 + input.readUInt32BE(at);
    return input.length < end ? undefined : [input.toString('utf8', at + 4, end), end];
  }

  // startNext starts the next run if none is in progress. The end of a run may depend on no task that is queued while code runs,
  // because the queue is lost when that code is terminated.
  function startNext() {
    const settings = busy ? undefined : text(TOKEN_SIZE + 1);
    const code = settings && text(settings[1]);
    if (!code) return;
    busy = true;
    token.run = Buffer.from(input.subarray(0, TOKEN_SIZE));
    const flags = input[TOKEN_SIZE];
    input = input.subarray(code[1]);
    run(flags, settings[0], code[0]).then((status) => {
      send(END, Buffer.of(status));
      busy = false;
      setImmediate(startNext);
    });
  }

  runs.on('data', (data) => {
    input = Buffer.concat([input, data]);
    if (token.session.length === 0 && input.length >= TOKEN_SIZE) {
      token.session = Buffer.from(input.subarray(0, TOKEN_SIZE));
      input = input.subarray(TOKEN_SIZE);
      send(READY, undefined, token.session);
    }
    if (token.session.length > 0) startNext();
  });
  runs.on('end', () => process.reallyExit(0));
}
