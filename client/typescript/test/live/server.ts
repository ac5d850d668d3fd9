// The server of the live tests, and their common helpers.

function required(name: string): string {
  const value = process.env[name];
  if (!value)
    throw new Error(`set ${name}: the live tests need a server with the images microsandbox/python and /node`);
  return value;
}

export const access = { serverUrl: required("MSB_SERVER_URL"), apiKey: required("MSB_API_KEY") };

/** Returns a sandbox name that is unique across test runs. */
export function newName(): string {
  return `ts-${process.pid}-${Math.random().toString(36).slice(2, 8)}`;
}

/** Returns the error with which a promise is rejected. Throws if the promise is resolved. */
export async function failure(promise: Promise<unknown>): Promise<unknown> {
  const outcome = await promise.then(
    (value) => ({ value }),
    (error: unknown) => ({ error }),
  );
  if ("value" in outcome) throw new Error(`the promise was resolved with ${JSON.stringify(outcome.value)}`);
  return outcome.error;
}
