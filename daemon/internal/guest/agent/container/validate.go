package container

import (
	"math"
	"path/filepath"
	"slices"
	"strings"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"

	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
)

const (
	// guestMountType is a mount type that only msbd uses. It mounts a file of the guest read-only into the container.
	guestMountType = "msb-guest"
	// portalSource is the portal's program in the guest.
	portalSource = "/msb-portal"

	// maxID is the maximum length in bytes of a container's or process's id.
	maxID = 128
	// maxDeviceNumber is the maximum major or minor number of a device.
	maxDeviceNumber = 1<<20 - 1
	// maxStringsBytes is the maximum size of a program's arguments and environment variables together.
	maxStringsBytes = 4 << 20
)

// guestMountSources are the permitted sources of mounts of type guestMountType.
var guestMountSources = []string{portalSource}

// ValidateID returns errdefs.ErrInvalidArgument unless id consists of 1 to maxID letters, digits, '.', '_' and '-' and
// begins with a letter or digit. kind is for the error's text. ValidateID does not use a regular expression, because
// each child would have to compile it at its start.
func ValidateID(kind, id string) error {
	if len(id) > maxID {
		return refusal.Invalid("%s id of %d bytes is longer than %d", kind, len(id), maxID)
	}
	for i, c := range []byte(id) {
		alnum := '0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z'
		if !alnum && (i == 0 || !strings.ContainsRune("._-", rune(c))) {
			return refusal.Invalid("%s id %q is invalid", kind, id)
		}
	}
	if id == "" {
		return refusal.Invalid("%s id is empty", kind)
	}
	return nil
}

// Validate checks a container's id, and the parts of its spec that a child relies on. It returns
// errdefs.ErrInvalidArgument if they are not valid.
func Validate(id string, spec *pb.Spec) error {
	if err := ValidateID("container", id); err != nil {
		return err
	}
	if spec == nil || spec.Root == nil {
		return refusal.Invalid("the container has no spec or no root")
	}
	if len(spec.Hostname) > 64 {
		return refusal.Invalid("hostname is longer than 64 bytes")
	}
	if err := validateProcess(spec.Process); err != nil {
		return err
	}
	for _, m := range spec.Mounts {
		if err := validateMount(m); err != nil {
			return err
		}
	}
	linux := spec.Linux
	if linux.GetSeccomp() != nil {
		return refusal.Invalid("this guest does not support seccomp profiles")
	}
	if spec.Process.SelinuxLabel != "" || linux.GetMountLabel() != "" {
		return refusal.Invalid("this guest has no SELinux: set disable_guest_selinux in Kata's configuration")
	}
	if len(linux.GetUIDMappings())+len(linux.GetGIDMappings()) > 0 {
		return refusal.Invalid("this guest does not support user namespaces")
	}
	for _, d := range linux.GetDevices() {
		if d == nil || !filepath.IsAbs(d.Path) || !slices.Contains([]string{"c", "u", "b", "p"}, d.Type) {
			return refusal.Invalid("device %q of type %q is invalid", d.GetPath(), d.GetType())
		}
		if d.Major < 0 || d.Major > maxDeviceNumber || d.Minor < 0 || d.Minor > maxDeviceNumber {
			return refusal.Invalid("device %q has the invalid number %d:%d", d.Path, d.Major, d.Minor)
		}
	}
	for _, path := range slices.Concat(linux.GetMaskedPaths(), linux.GetReadonlyPaths()) {
		if !filepath.IsAbs(path) {
			return refusal.Invalid("masked or read-only path %q is not absolute", path)
		}
	}
	for key := range linux.GetSysctl() {
		if key == "" || strings.ContainsAny(key, "/\x00") || strings.Contains(key, "..") {
			return refusal.Invalid("sysctl name %q is invalid", key)
		}
	}
	return nil
}

func validateMount(m *pb.Mount) error {
	if m == nil || !filepath.IsAbs(m.Destination) {
		return refusal.Invalid("mount destination %q is not absolute", m.GetDestination())
	}
	if m.Type == guestMountType && !slices.Contains(guestMountSources, m.Source) {
		return refusal.Invalid("mount of the guest's file %q: only %q may be mounted", m.Source, guestMountSources)
	}
	return nil
}

func validateProcess(p *pb.Process) error {
	if p == nil || len(p.Args) == 0 || p.Args[0] == "" {
		return refusal.Invalid("the process has no program")
	}
	if p.Cwd != "" && !filepath.IsAbs(p.Cwd) {
		return refusal.Invalid("working directory %q is not absolute", p.Cwd)
	}
	size := 0
	for _, s := range slices.Concat(p.Args, p.Env) {
		if strings.Contains(s, "\x00") {
			return refusal.Invalid("an argument or environment variable contains a NUL byte")
		}
		size += len(s)
	}
	if size > maxStringsBytes {
		return refusal.Invalid("arguments and environment variables take %d bytes, more than %d", size, maxStringsBytes)
	}
	for _, l := range p.Rlimits {
		if _, ok := rlimits[l.GetType()]; !ok {
			return refusal.Invalid("unknown rlimit %q", l.GetType())
		}
		if l.Soft > l.Hard {
			return refusal.Invalid("%s: the soft limit %d is larger than the hard limit %d", l.Type, l.Soft, l.Hard)
		}
	}
	// To the kernel, the largest id means "leave unchanged", so the process would keep root's id.
	for _, id := range append([]uint32{p.User.GetUID(), p.User.GetGID()}, p.User.GetAdditionalGids()...) {
		if id == math.MaxUint32 {
			return refusal.Invalid("user or group id %d is invalid", id)
		}
	}
	if p.OOMScoreAdj < -1000 || p.OOMScoreAdj > 1000 {
		return refusal.Invalid("OOM score adjustment %d is not in the range -1000 to 1000", p.OOMScoreAdj)
	}
	c := p.Capabilities
	for _, names := range [][]string{c.GetBounding(), c.GetEffective(), c.GetPermitted(), c.GetInheritable(), c.GetAmbient()} {
		if _, err := capabilityMask(names); err != nil {
			return refusal.Invalid("%v", err)
		}
	}
	return nil
}
