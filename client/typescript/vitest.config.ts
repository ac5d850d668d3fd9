import { defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    projects: [
      { test: { name: "unit", include: ["test/unit/*.test.ts"] } },
      // What npm would publish. Needs a build.
      { test: { name: "package", include: ["test/package/*.test.ts"], testTimeout: 60_000, hookTimeout: 60_000 } },
      // Against the server of MSB_SERVER_URL. One file at a time: each starts sandboxes.
      {
        test: {
          name: "live",
          include: ["test/live/*.test.ts"],
          testTimeout: 120_000,
          hookTimeout: 120_000,
          fileParallelism: false,
        },
      },
    ],
  },
});
