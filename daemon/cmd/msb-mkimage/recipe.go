package main

// recipe is one image: Debian packages, with what they bring along but nobody here needs left out.
type recipe struct {
	packages []string
	// remove holds shell patterns below the image's root.
	remove []string
	cmd    []string
}

// base is what code that an AI writes expects of any machine: a shell, the usual tools, TLS roots, and
// apt for the rest. curl fetches over HTTPS; procps brings ps and free.
// Left out are compilers and git: they would double the image, and apt has them.
var base = []string{
	// Instead of usrmerge, which only converts old machines and needs all of perl to do so.
	"usr-is-merged",
	"bash", "coreutils", "ca-certificates", "curl", "procps",
}

var recipes = map[string]recipe{
	"python": {
		// python-is-python3: most scripts say "python".
		packages: []string{"python3", "python3-pip", "python3-venv", "python-is-python3"},
		// The marker makes pip refuse to install outside of a virtual environment. That guards a
		// machine's own tools; a sandbox is there to be installed into.
		remove: []string{"usr/lib/python3*/EXTERNALLY-MANAGED"},
		cmd:    []string{"python3"},
	},
	"node": {
		packages: []string{"nodejs", "npm"},
		// Debian's npm depends on packages that bundle whole tool chains beside the one module
		// that npm uses. npm's modules require none of these: 17,000 of 22,000 files.
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
