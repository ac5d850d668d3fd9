package host

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// A version is the version of a program.
type version struct {
	numbers    [3]int // major, minor, patch
	prerelease bool   // such as an alpha or a release candidate of this version
}

var (
	versionRE = regexp.MustCompile(`^v?(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?(.*)$`)
	// Distributions add other suffixes, such as -1 or ~ds1. They do not mean a prerelease.
	prereleaseRE = regexp.MustCompile(`^[-~.]?(alpha|beta|rc|pre|dev)`)
)

// pseudoRE matches the date in a Go pseudo-version.
var pseudoRE = regexp.MustCompile(`^v0\.0\.0-(\d{4})(\d\d)(\d\d)\d{6}-[0-9a-f]{12}$`)

// readable returns version as messages show it. For a Go pseudo-version, that is its date.
func readable(version string) string {
	return pseudoRE.ReplaceAllString(version, "of $1-$2-$3")
}

// parseVersion parses text, a version as programs report it, such as 3.20.0, v1.7.35, 3.31.0-rc0, 7.2 or 1.7.24~ds1-6.
// A Go pseudo-version, such as v0.0.0-20250828155603-754f07cff239, is older than any release.
func parseVersion(text string) (version, error) {
	m := versionRE.FindStringSubmatch(text)
	if m == nil {
		return version{}, fmt.Errorf("invalid version %q", text)
	}
	v := version{prerelease: prereleaseRE.MatchString(m[4])}
	for i := range v.numbers {
		v.numbers[i], _ = strconv.Atoi(cmp.Or(m[i+1], "0")) // versionRE matches only digits
	}
	return v, nil
}

func (v version) less(w version) bool {
	if c := slices.Compare(v.numbers[:], w.numbers[:]); c != 0 {
		return c < 0
	}
	return v.prerelease && !w.prerelease
}

// older reports whether text is a version before release. It returns true if text is not a valid version, because
// nothing is known about such a version.
func older(text, release string) bool {
	v, err := parseVersion(text)
	w, _ := parseVersion(release)
	return err != nil || v.less(w)
}

// fixedKata is the first version of Kata without a known escape from the microVM that could affect msbd.
const fixedKata = "3.31.0"

// kataAdvisories lists Kata's security advisories and the release that fixes each.
var kataAdvisories = []struct {
	fixedIn, id string
	rust        bool // affects only the Rust runtime; the built-in shim is the Go runtime
}{
	{"3.26.0", "CVE-2026-24054", false}, // an image without layers gets a disk of the host
	{"3.27.0", "CVE-2026-24834", false}, // Cloud Hypervisor: a container can write to its guest's root file system
	{"3.29.0", "CVE-2026-41326", false}, // confidential guests: a host can bypass the agent's policy
	{"3.31.0", "CVE-2026-44210", false}, // annotations can set virtiofsd's arguments
	{"3.31.0", "CVE-2026-47243", true},  // guest root can become host root through virtiofsd
}

// KataWarning returns a warning about the known vulnerabilities of Kata's version on this route, or "" if there are
// none.
func (r Route) KataWarning(version string) string {
	fault := r.kataFault(version)
	if fault == "" {
		return ""
	}
	if r.Accelerator == TCG {
		fault += "; emulated guests are not isolated by hardware in any case"
	}
	return fmt.Sprintf("Kata %s is %s; %s", readable(version), fault, newerKata)
}

const newerKata = "install a newer Kata and set kata-shim and kata-config to it"

// kataFault describes the known vulnerabilities of Kata's version. The result completes the sentence "Kata is …". It is
// "" if there are none.
func (r Route) kataFault(version string) string {
	if r.dragonball && older(version, "4.0.0") {
		return "older than 4.0.0, which fixes an escape from its hypervisor Dragonball (GHSA-fgm4-mv68-h344)"
	}
	if !older(version, fixedKata) {
		return ""
	}
	var ids []string
	for _, a := range kataAdvisories {
		if older(version, a.fixedIn) && (r.hostShim || !a.rust) {
			ids = append(ids, a.id)
		}
	}
	text := fmt.Sprintf("older than %s, which fixes known vulnerabilities (%s)", fixedKata, strings.Join(ids, ", "))
	if !r.hostShim && !r.hostConfig {
		text += "; clients cannot reach them with msbd's configuration"
	}
	return text
}

// fixedContainerd lists, for each release series of containerd, the first version without CVE-2026-53488 and
// CVE-2026-47262. Later series were never affected.
var fixedContainerd = []string{"1.7.33", "2.0.10", "2.1.9", "2.2.5", "2.3.2"}

// ContainerdWarning returns a warning about the known vulnerabilities of containerd's version, or "" if there are none.
func ContainerdWarning(version string) string {
	fixedIn := fixedContainerd[0]
	if v, err := parseVersion(version); err == nil {
		for _, text := range fixedContainerd {
			if w, _ := parseVersion(text); w.numbers[0] == v.numbers[0] && w.numbers[1] == v.numbers[1] {
				fixedIn = text
			}
		}
	}
	if !older(version, fixedIn) {
		return ""
	}
	return fmt.Sprintf("containerd %s has known vulnerabilities that %s fixes (CVE-2026-53488, CVE-2026-47262); update it, or remove the "+
		"setting containerd so that msbd runs a private one", version, fixedIn)
}
