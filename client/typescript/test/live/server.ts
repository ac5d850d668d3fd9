// The server that the live tests are for, and what they have in common.

function required(name: string): string {
  const value = process.env[name];
  if (!value)
    throw new Error(`set ${name}: the live tests need a server with the images microsandbox/python and /node`);
  return value;
}

export const access = { serverUrl: required("MSB_SERVER_URL"), apiKey: required("MSB_API_KEY") };

/** A name that no other run of the tests has. */
export function newName(): string {
  return `ts-${process.pid}-${Math.random().toString(36).slice(2, 8)}`;
}

/** What a promise that must fail fails with. */
export async function failure(promise: Promise<unknown>): Promise<unknown> {
  const value = await promise.then(
    (value) => ({ value }),
    (error: unknown) => ({ error }),
  );
  if ("value" in value) throw new Error(`it did not fail, but gave ${JSON.stringify(value.value)}`);
  return value.error;
}
