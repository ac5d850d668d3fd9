// Node.js before 20.5 does not have Symbol.asyncDispose; compiled `await using` blocks then use this one. Modules with
// classes that have such a method import this one first.
if (!Symbol.asyncDispose) {
  Object.defineProperty(Symbol, "asyncDispose", { value: Symbol("Symbol.asyncDispose") });
}
