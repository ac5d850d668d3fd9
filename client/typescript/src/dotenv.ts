// A line before its value: NAME=, with an optional export before it.
const assignment = /[ \t]*(?:export[ \t]+)?([\w.-]+)[ \t]*(=?)[ \t]*/y;
const quoted = /"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'/sy;
const comment = /(^|[ \t])#.*/;

// What a backslash and this character mean. Any other pair stays as it is.
const inDouble: Record<string, string> = { n: "\n", r: "\r", t: "\t", '"': '"', "'": "'", "\\": "\\", $: "$" };
const inSingle: Record<string, string> = { "'": "'", "\\": "\\" };

/**
 * Finds a variable in the text of a .env file; empty if it is not there. It reads what msb reads, and what the
 * popular dotenv tools read alike.
 *
 * Values are bare or in quotes, quoted ones over several lines, comments are behind a #, and the last one of
 * a name counts. Nothing is interpolated. A line in no such form is passed over, unless it is for the name
 * that is asked for: then it throws an error that names the line, and has nothing of its text.
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

/** The value that begins at a place, or what is wrong with it; and a place in its last line. */
function readValue(
  text: string,
  at: number,
  assigned: boolean,
): ({ text: string } | { problem: string }) & { end: number } {
  if (!assigned) return { problem: "there is no = behind the name", end: at };
  if (text[at] !== '"' && text[at] !== "'") return { text: bare(text, at), end: at };
  const match = matchAt(quoted, text, at);
  if (!match) return { problem: "the quote that begins the value has no end", end: at };
  const end = at + match[0].length;
  if (bare(text, end) !== "") return { problem: "there is something behind the quoted value", end };
  return { text: match[1] === undefined ? unescaped(match[2] ?? "", inSingle) : unescaped(match[1], inDouble), end };
}

function matchAt(pattern: RegExp, text: string, at: number): RegExpExecArray | null {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

function lineEnd(text: string, at: number): number {
  const end = text.indexOf("\n", at);
  return end < 0 ? text.length : end;
}

/** The rest of a line, without a comment and the space around. */
function bare(text: string, at: number): string {
  return text.slice(at, lineEnd(text, at)).replace(comment, "").trim();
}

function unescaped(text: string, meant: Record<string, string>): string {
  return text.replace(/\\(.)/gs, (pair, character: string) => meant[character] ?? pair);
}
