package main

// recipe describes an image.
type recipe struct {
	// packages are Debian packages in addition to base.
	packages []string
	// remove lists files of the packages that are not needed, as shell patterns relative to the image's root.
	remove []string
	// cmd is the image's default command.
	cmd []string
}

// base lists the packages of every image. Code that an AI writes expects a shell, the usual tools and TLS root
// certificates on any machine, and can install the rest with apt. curl fetches over HTTPS; procps provides ps and free;
// without tzdata, TZ=America/New_York would silently mean UTC, and Python's zoneinfo would know no zone.
// Compilers and git are left out, because they would double the size of the image and can be installed with apt.
var base = []string{
	// This package replaces usrmerge, which is only for converting old systems and needs the complete perl.
	"usr-is-merged",
	"bash", "coreutils", "ca-certificates", "curl", "procps", "tzdata",
}

var recipes = map[string]recipe{
	"python": {
		// python-is-python3 provides the command python, which most scripts use.
		packages: []string{"python3", "python3-pip", "python3-venv", "python-is-python3"},
		// With this file, pip refuses to install outside of a virtual environment. That protects the tools of a normal
		// system, but is not useful in a sandbox.
		remove: []string{"usr/lib/python3*/EXTERNALLY-MANAGED"},
		cmd:    []string{"python3"},
	},
	"node": {
		packages: []string{"nodejs", "npm"},
		// Debian's npm depends on packages from which it uses only one module each. These packages also contain
		// complete tool chains. npm's modules do not require the files below, which are 17,000 of the 22,000 files.
		remove: []string{
			"usr/share/nodejs/@babel", "usr/share/nodejs/@jridgewell", "usr/share/nodejs/@types", "usr/share/nodejs/@webassemblyjs",
			"usr/share/nodejs/ajv", "usr/share/nodejs/caniuse-lite", "usr/share/nodejs/core-js*", "usr/share/nodejs/es-abstract",
			"usr/share/nodejs/eslint", "usr/share/nodejs/handlebars", "usr/share/nodejs/istanbul*", "usr/share/nodejs/js-yaml",
			"usr/share/nodejs/lodash", "usr/share/nodejs/lodash-*", "usr/share/nodejs/postcss", "usr/share/nodejs/regenerate-unicode-properties",
			"usr/share/nodejs/terser", "usr/share/nodejs/web-streams-polyfill", "usr/share/nodejs/webassemblyjs", "usr/share/nodejs/webpack",
			"usr/share/nodejs/yargs",
			"usr/share/javascript",
			"usr/lib/*/lib*.a",
		},
		cmd: []string{"node"},
	},
}
