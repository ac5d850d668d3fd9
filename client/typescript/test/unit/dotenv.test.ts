import { expect, test } from "vitest";
import { lookup } from "../../src/dotenv.js";

// The table is a copy of the one in client/dotenv_test.go.
test.each([
  ["", ""],
  ["A=b", "b"],
  ["A=b\n", "b"],
  ["A=b\r\n", "b"],
  ["A=b\rB=c", "b"],
  ["\ufeffA=b", "b"],
  ["  A = b  ", "b"],
  ["\tA\t=\tb\t", "b"],
  ["export A=b", "b"],
  ["export\t A=b", "b"],
  ["export=1\nA=b", "b"],
  ["A=", ""],
  ["A=\nB=c", ""],
  ["A=b c", "b c"],
  ["A=b=c", "b=c"],
  ["A=b#c", "b#c"],
  ["A=b #c", "b"],
  ["A=b\t# c", "b"],
  ["A= # c", ""],
  ["#A=b", ""],
  [" # A=b\n\n\nA=c", "c"],
  ["A=b\nA=c", "c"],
  ["A=b\nA=", ""],
  ["a=b", ""],
  ["AA=b\nXA=c\nA.B=d\nA-B=e", ""],
  ["B=A=c", ""],
  ['A="b"', "b"],
  ["A='b'", "b"],
  ['A="b" # c', "b"],
  ['A="b"# c', "b"],
  ['A="b # c"', "b # c"],
  [`A='b "c"'`, 'b "c"'],
  [`A="b 'c'"`, "b 'c'"],
  ['A=" b "', " b "],
  ['A=""', ""],
  ['A=b"c"', 'b"c"'],
  [String.raw`A="b\nc\td\r\"\\\'"`, "b\nc\td\r\"\\'"],
  [String.raw`A='b\nc'`, String.raw`b\nc`],
  [String.raw`A='b\'c\\'`, String.raw`b'c\ `.trim()],
  [String.raw`A="b\$C\d"`, String.raw`b$C\d`],
  [`A="$B \${B}"`, `$B \${B}`],
  ["A=$B", "$B"],
  ['A="b\nc"\nB=d', "b\nc"],
  ["A='b\r\nc'", "b\nc"],
  ['B="x\nA=b\n"\nA=c', "c"],
  ["B='x\nA=b", "b"],
  ['B="x" y\nA=b', "b"],
  ["nonsense\n=x\n: y\nA=b", "b"],
  ["B='-----BEGIN\nA=b\n-----END'", ""],
  ["A='b'\n\n\n", "b"],
  ["\0\xff\nA=\xff", "\xff"],
  ["if [ -f x ]; then\n  A=b\nfi\n", "b"],
])("%j gives %j", (text, value) => {
  expect(lookup(text, "A")).toBe(value);
});

test.each([
  ["A", "line 1: there is no ="],
  ["B=c\n\nA: hunter2", "line 3: there is no ="],
  ["export A hunter2", "line 1: there is no ="],
  ["B='x\ny'\nA=\"hunter2", "line 3: the closing quote"],
  ["A='hunter2\nB=c", "line 1: the closing quote"],
  [String.raw`A="hunter2\"`, "line 1: the closing quote"],
  ["A='x' hunter2", "line 1: there is text after"],
  ["#\r\n\r\nA='x'=hunter2#", "line 3: there is text after"],
])("%j is refused without its text", (text, problem) => {
  expect(() => lookup(text, "A")).toThrow(problem);
  expect(() => lookup(text, "A")).not.toThrow("hunter2");
});

test("a long value and many lines are parsed quickly", () => {
  const long = "x\\n".repeat(1 << 18);
  expect(lookup(`A="${long}"\n`, "A")).toBe("x\n".repeat(1 << 18));
  expect(lookup(`${"B='\n".repeat(1 << 16)}'\nA=b`, "A")).toBe("b");
});
