import { defineConfig } from "vitest/config";

/** Milliseconds that no test or hook takes on any machine, unless it hangs. */
const limit = (ms: number) => ({ testTimeout: ms, hookTimeout: ms });

export default defineConfig({
  test: {
    projects: [
      { test: { name: "unit", include: ["test/unit/*.test.ts"], ...limit(60_000) } },
      // What npm would publish. Needs a build.
      { test: { name: "package", include: ["test/package/*.test.ts"], ...limit(300_000) } },
      // Against the server of MSB_SERVER_URL. One file at a time: each starts sandboxes.
      {
        test: {
          name: "live",
          include: ["test/live/*.test.ts"],
          fileParallelism: false,
          ...limit(300_000),
        },
      },
    ],
  },
});
