// Package version has the version of this release. msb, msbd, the portal in each sandbox and rpc.discover all report it.
package version

import "runtime/debug"

// Number is the version of the release, also of the SDKs. It follows semver.org.
const Number = "0.3.0"

// commit is the Git commit that was built. It is set by the linker (-X), see Makefile.
var commit string

// String returns Number, and the commit if it is known, such as 0.3.0+g1a2b3c4d5e6f. It ends in -dirty if the source
// differed from that commit.
func String() string {
	if commit == "" {
		commit = builtCommit()
	}
	if commit == "" {
		return Number
	}
	return Number + "+g" + commit
}

// builtCommit returns the commit that the go command recorded, or "". It records none with -buildvcs=false, which the
// Makefile sets.
func builtCommit() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	revision, dirty := "", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			revision = s.Value[:min(12, len(s.Value))]
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "-dirty"
		}
	}
	if revision == "" {
		return ""
	}
	return revision + dirty
}
