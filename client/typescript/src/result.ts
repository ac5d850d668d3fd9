/** A value that code has shown, as the server sends it. */
export interface ResultData {
  data?: Record<string, unknown>;
  is_main?: boolean;
}

/** The names of the formats, as in the properties of Result, and their MIME types. */
const mimeTypes = {
  text: "text/plain",
  html: "text/html",
  markdown: "text/markdown",
  svg: "image/svg+xml",
  png: "image/png",
  jpeg: "image/jpeg",
  pdf: "application/pdf",
  latex: "text/latex",
  json: "application/json",
  javascript: "application/javascript",
  data: "application/vnd.dataframe+json",
} as const;

/**
 * A value that code has shown, in all formats in which it can be shown. A format that the value does not have is
 * undefined. Images and PDF documents are base64.
 */
export class Result {
  /** All formats by their MIME types. */
  readonly raw: Readonly<Record<string, unknown>>;
  /** Whether this is the value of the last expression. */
  readonly isMain: boolean;

  /** Parses an element of results, or an event display. */
  constructor({ data, is_main }: ResultData = {}) {
    this.raw = data ?? {};
    this.isMain = is_main ?? false;
  }

  get text(): string | undefined {
    return this.#string("text");
  }

  get html(): string | undefined {
    return this.#string("html");
  }

  get markdown(): string | undefined {
    return this.#string("markdown");
  }

  get svg(): string | undefined {
    return this.#string("svg");
  }

  /** A PNG as base64. */
  get png(): string | undefined {
    return this.#string("png");
  }

  /** A JPEG as base64. */
  get jpeg(): string | undefined {
    return this.#string("jpeg");
  }

  /** A PDF document as base64. */
  get pdf(): string | undefined {
    return this.#string("pdf");
  }

  get latex(): string | undefined {
    return this.#string("latex");
  }

  /** JSON, which is already parsed. */
  get json(): unknown {
    return this.raw[mimeTypes.json];
  }

  get javascript(): string | undefined {
    return this.#string("javascript");
  }

  /** A DataFrame of pandas: a list for each column. */
  get data(): Record<string, unknown[]> | undefined {
    return this.raw[mimeTypes.data] as Record<string, unknown[]> | undefined;
  }

  /** Returns the names of the formats that the value has, such as text and png, and MIME types that have no name. */
  formats(): string[] {
    const names = new Map<string, string>(Object.entries(mimeTypes).map(([name, type]) => [type, name]));
    return Object.keys(this.raw).map((type) => names.get(type) ?? type);
  }

  /** Returns the text; empty if there is none. */
  toString(): string {
    return this.text ?? "";
  }

  #string(format: keyof typeof mimeTypes): string | undefined {
    const value = this.raw[mimeTypes[format]];
    return typeof value === "string" ? value : undefined;
  }
}
