/** A line of a run's output, without the newline. */
export interface OutputLine {
  stream: "stdout" | "stderr";
  text: string;
}

/** A piece of output, as the server sends it. */
export interface PieceData {
  stream?: string;
  text?: string;
  base64?: string;
}

/** A piece of output as it was printed, which need not be a line. */
export interface OutputPiece {
  /** The output of a terminal is stdout. */
  stream: OutputLine["stream"];
  /** The text. A character that the piece contains only in part is in the next piece. */
  text: string;
  /** The bytes; those of text unless the output was requested as bytes. */
  bytes: Uint8Array;
}

/** Decodes the pieces of a run's output. */
export class PieceDecoder {
  readonly #decoders = { stdout: new TextDecoder(), stderr: new TextDecoder() };

  decode({ stream: name, text, base64 }: PieceData): OutputPiece {
    const stream = name === "stderr" ? "stderr" : "stdout";
    if (typeof base64 !== "string") return { stream, text: text ?? "", bytes: Buffer.from(text ?? "") };
    const bytes = Buffer.from(base64, "base64");
    return { stream, text: this.#decoders[stream].decode(bytes, { stream: true }), bytes };
  }
}

/** Collects pieces of output into lines. A line stands where it began, as in the output of a run without callbacks. */
export class OutputCollector {
  readonly lines: OutputLine[] = [];
  readonly #decoder = new PieceDecoder();
  readonly #bytes: Record<OutputLine["stream"], Uint8Array[]> = { stdout: [], stderr: [] };
  /** The lines that have no newline yet. */
  readonly #open: Partial<Record<OutputLine["stream"], OutputLine>> = {};

  /** Decodes a piece and adds it. */
  add(data: PieceData): OutputPiece {
    const piece = this.#decoder.decode(data);
    this.#bytes[piece.stream].push(piece.bytes);
    this.#addText(piece.stream, piece.text);
    return piece;
  }

  /** Adds text that is not from the output. It has lines of its own. */
  addLines(stream: OutputLine["stream"], text: string): void {
    if (text === "") return;
    delete this.#open[stream];
    this.#addText(stream, text.endsWith("\n") ? text : `${text}\n`);
  }

  /** Returns the bytes of a stream. */
  bytes(stream: OutputLine["stream"]): Uint8Array {
    return Buffer.concat(this.#bytes[stream]);
  }

  #addText(stream: OutputLine["stream"], text: string): void {
    const parts = text.split("\n");
    parts.forEach((part, i) => {
      const isLast = i === parts.length - 1;
      let line = this.#open[stream];
      if (line) {
        line.text += part;
      } else if (part !== "" || !isLast) {
        line = { stream, text: part };
        this.lines.push(line);
      }
      if (isLast && line) this.#open[stream] = line;
      else delete this.#open[stream];
    });
  }
}

/** The output of a run. */
export class Output {
  /** The lines of both streams, in the order in which they began. */
  readonly lines: OutputLine[];
  /** Whether a part of the output is missing. That is possible only in the execution of an error. */
  readonly truncated: boolean;

  constructor(lines: OutputLine[] = [], truncated = false) {
    this.lines = lines;
    this.truncated = truncated;
  }

  /** The standard output, without trailing white space. */
  get stdout(): string {
    return this.#select("stdout");
  }

  /** The standard error, without trailing white space. */
  get stderr(): string {
    return this.#select("stderr");
  }

  /** Both, in the order of lines, without trailing white space. */
  get text(): string {
    return this.#select("stdout", "stderr");
  }

  /** Returns text. */
  toString(): string {
    return this.text;
  }

  /** The standard output, without surrounding white space. It does not wait; the original SDK made it async. */
  async output(): Promise<string> {
    return this.stdout.trim();
  }

  /** The standard error, without surrounding white space. It does not wait; the original SDK made it async. */
  async error(): Promise<string> {
    return this.stderr.trim();
  }

  #select(...streams: OutputLine["stream"][]): string {
    const lines = this.lines.filter((line) => streams.includes(line.stream));
    return lines
      .map((line) => line.text)
      .join("\n")
      .trimEnd();
  }
}
