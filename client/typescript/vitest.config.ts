import { defineConfig } from "vitest/config";

/** A limit in milliseconds that tests and hooks reach only if they hang, even on a slow machine. */
const limit = (ms: number) => ({ testTimeout: ms, hookTimeout: ms });

export default defineConfig({
  test: {
    projects: [
      { test: { name: "unit", include: ["test/unit/*.test.ts"], ...limit(180_000) } },
      // Tests of the package that npm would publish. They need a build.
      { test: { name: "package", include: ["test/package/*.test.ts"], ...limit(600_000) } },
      // Tests against the server at MSB_SERVER_URL. They run one file at a time, because each file starts sandboxes.
      {
        test: {
          name: "live",
          include: ["test/live/*.test.ts"],
          fileParallelism: false,
          ...limit(900_000),
        },
      },
    ],
  },
});
