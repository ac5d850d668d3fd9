package host

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// A version is a release's three numbers, and whether it comes before that release.
type version struct {
	numbers [3]int
	before  bool
}

var (
	versionRE = regexp.MustCompile(`^v?(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?(.*)$`)
	// What a distribution appends, such as -1 or ~ds1, comes after the release.
	beforeRE = regexp.MustCompile(`^[-~.]?(alpha|beta|rc|pre|dev)`)
)

// pseudoRE finds the day in a Go pseudo-version.
var pseudoRE = regexp.MustCompile(`^v0\.0\.0-(\d{4})(\d\d)(\d\d)\d{6}-[0-9a-f]{12}$`)

// readable is a version as people understand it.
func readable(version string) string {
	return pseudoRE.ReplaceAllString(version, "of $1-$2-$3")
}

// parseVersion reads what a program says of itself: 3.20.0, v1.7.35, 3.31.0-rc0, 7.2, 1.7.24~ds1-6. A Go
// pseudo-version, v0.0.0-20250828155603-754f07cff239, is older than any release.
func parseVersion(text string) (version, error) {
	m := versionRE.FindStringSubmatch(text)
	if m == nil {
		return version{}, fmt.Errorf("%q is no version", text)
	}
	v := version{before: beforeRE.MatchString(m[4])}
	for i := range v.numbers {
		v.numbers[i], _ = strconv.Atoi(cmp.Or(m[i+1], "0")) // digits
	}
	return v, nil
}

func (v version) less(w version) bool {
	if c := slices.Compare(v.numbers[:], w.numbers[:]); c != 0 {
		return c < 0
	}
	return v.before && !w.before
}

// older compares what programs say. What is no version is as old as can be: nothing is known to be good of it.
func older(text, release string) bool {
	v, err := parseVersion(text)
	w, _ := parseVersion(release)
	return err != nil || v.less(w)
}

// goodKata is the first version of Kata without a known way out of the microVM that msbd could meet.
const goodKata = "3.31.0"

// kataHoles are the security advisories of Kata's, by the release that closes each.
var kataHoles = []struct {
	closed, id string
	rust       bool // of the runtime in Rust; the built-in shim is the one in Go
}{
	{"3.26.0", "CVE-2026-24054", false}, // an image without layers gets a disk of the host
	{"3.27.0", "CVE-2026-24834", false}, // Cloud Hypervisor: a container writes to its guest's root
	{"3.29.0", "CVE-2026-41326", false}, // confidential guests: a host gets past the agent's policy
	{"3.31.0", "CVE-2026-44210", false}, // annotations set virtiofsd's arguments
	{"3.31.0", "CVE-2026-47243", true},  // guest root becomes host root through virtiofsd
}

// KataWarning says what is known to be wrong with a version of Kata on this route; nothing, if nothing is.
func (r Route) KataWarning(version string) string {
	fault := r.kataFault(version)
	if fault == "" {
		return ""
	}
	if r.Accelerator == TCG {
		fault += "; an emulated guest has no hardware boundary anyway"
	}
	return fmt.Sprintf("Kata %s is %s: %s", readable(version), fault, newerKata)
}

const newerKata = "install a newer Kata, and name it with kata-shim and kata-config"

// kataFault is what a version of Kata is, if something is known to be wrong with it.
func (r Route) kataFault(version string) string {
	if r.dragonball && older(version, "4.0.0") {
		return "older than 4.0.0, which closes a way out of its hypervisor Dragonball (GHSA-fgm4-mv68-h344)"
	}
	if !older(version, goodKata) {
		return ""
	}
	var holes []string
	for _, h := range kataHoles {
		if older(version, h.closed) && (r.ownShim || !h.rust) {
			holes = append(holes, h.id)
		}
	}
	text := fmt.Sprintf("older than %s, which closes known holes (%s)", goodKata, strings.Join(holes, ", "))
	if !r.ownShim && !r.ownConfig {
		text += "; as msbd configures it, no client reaches them"
	}
	return text
}

// goodContainerd are the first versions of containerd's series without CVE-2026-53488 and CVE-2026-47262.
// Later series never had them.
var goodContainerd = []string{"1.7.33", "2.0.10", "2.1.9", "2.2.5", "2.3.2"}

// ContainerdWarning says what is known to be wrong with a version of containerd; nothing, if nothing is.
func ContainerdWarning(version string) string {
	good := goodContainerd[0]
	if v, err := parseVersion(version); err == nil {
		for _, text := range goodContainerd {
			if w, _ := parseVersion(text); w.numbers[0] == v.numbers[0] && w.numbers[1] == v.numbers[1] {
				good = text
			}
		}
	}
	if !older(version, good) {
		return ""
	}
	return fmt.Sprintf("containerd %s has known holes that %s closes (CVE-2026-53488, CVE-2026-47262): update it, or let msbd run its own "+
		"(leave out the setting containerd)", version, good)
}
