// The part of a line that precedes the value: NAME=, optionally after export.
const assignment = /[ \t]*(?:export[ \t]+)?([\w.-]+)[ \t]*(=?)[ \t]*/y;
const quoted = /"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'/sy;
const comment = /(^|[ \t])#.*/;

// The characters that may follow a backslash, and what the pair means. Any other pair is kept.
const doubleEscapes: Record<string, string> = { n: "\n", r: "\r", t: "\t", '"': '"', "'": "'", "\\": "\\", $: "$" };
const singleEscapes: Record<string, string> = { "'": "'", "\\": "\\" };

/**
 * Returns the value of a variable in the text of a .env file; empty if it is not set. It reads files as msb does, and
 * supports what the popular dotenv tools agree on.
 *
 * Values are bare or in single or double quotes. Quoted values may span several lines. Comments follow a #. If a name
 * occurs several times, the last value counts. Nothing is interpolated. Malformed lines are skipped, except those of
 * the variable itself: then lookup throws an error that contains the line's number, but none of its text, which may
 * be secret.
 */
export function lookup(file: string, name: string): string {
  const text = file.replace(/^\ufeff/, "").replace(/\r\n?/g, "\n");
  let found = "";
  for (let at = 0; at < text.length;) {
    const match = matchAt(assignment, text, at);
    let end = at;
    if (match) {
      const value = readValue(text, at + match[0].length, match[2] === "=");
      if (match[1] === name) {
        if ("problem" in value) throw new Error(`line ${text.slice(0, at).split("\n").length}: ${value.problem}`);
        found = value.text;
      }
      end = value.end;
    }
    at = lineEnd(text, end) + 1;
  }
  return found;
}

/** Returns the value that begins at an offset, or a problem, and an offset in its last line. */
function readValue(
  text: string,
  at: number,
  assigned: boolean,
): ({ text: string } | { problem: string }) & { end: number } {
  if (!assigned) return { problem: "there is no = after the name", end: at };
  if (text[at] !== '"' && text[at] !== "'") return { text: bare(text, at), end: at };
  const match = matchAt(quoted, text, at);
  if (!match) return { problem: "the closing quote is missing", end: at };
  const end = at + match[0].length;
  if (bare(text, end) !== "") return { problem: "there is text after the quoted value", end };
  return {
    text: match[1] === undefined ? unescape(match[2] ?? "", singleEscapes) : unescape(match[1], doubleEscapes),
    end,
  };
}

function matchAt(pattern: RegExp, text: string, at: number): RegExpExecArray | null {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

function lineEnd(text: string, at: number): number {
  const end = text.indexOf("\n", at);
  return end < 0 ? text.length : end;
}

/** Returns the rest of a line, without a comment and surrounding white space. */
function bare(text: string, at: number): string {
  return text.slice(at, lineEnd(text, at)).replace(comment, "").trim();
}

function unescape(text: string, escapes: Record<string, string>): string {
  return text.replace(/\\(.)/gs, (pair, character: string) => escapes[character] ?? pair);
}
