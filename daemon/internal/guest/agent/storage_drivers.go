package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
)

const (
	// createDirectory is how the shim names a directory that an overlay needs; only the guest can make
	// it.
	createDirectory = "io.katacontainers.volume.overlayfs.create_directory="
	// writableOverlay asks for an upper layer of the guest's own.
	writableOverlay = "io.katacontainers.fs-opt.overlay-rw"
	// runtimeOptions begins what the shim tells itself among a file system's options.
	runtimeOptions = "io.katacontainers."
	// overlays is where those upper layers are.
	overlays = "/run/msb/overlay"
)

// storageDrivers are the kinds of storage that the host may ask for. Each makes st available at s.
var storageDrivers = map[string]func(ctx context.Context, st *pb.Storage, s *storage) error{
	"virtio-fs":      attachMount,
	"9p":             attachMount,
	"ephemeral":      attachEphemeral,
	"local":          attachLocal,
	"overlayfs":      attachOverlay,
	"bind":           attachBind,
	"watchable-bind": attachBind,
	"blk":            attachDisk,
	"scsi":           attachDisk,
	"mmioblk":        attachDisk,
	"nvdimm":         attachDisk,
}

func attachMount(_ context.Context, st *pb.Storage, s *storage) error {
	return mountStorage(s, st.Source, st.Fstype, st.Options)
}

// attachDisk mounts a disk's file system, or puts the disk itself at the mount point.
func attachDisk(ctx context.Context, st *pb.Storage, s *storage) error {
	disk, err := diskFinders[st.Driver](ctx, st.Source)
	if err != nil {
		return err
	}
	if st.Fstype == "bind" || st.Fstype == "" {
		s.disk = disk
		return bindStorage(s, disk, st.Options)
	}
	return mountStorage(s, disk, st.Fstype, st.Options)
}

// attachEphemeral mounts memory.
func attachEphemeral(_ context.Context, st *pb.Storage, s *storage) error {
	s.kept = true
	if st.Fstype == "hugetlbfs" {
		if err := reserveHugePages("/sys/kernel/mm/hugepages", st.Options); err != nil {
			return err
		}
	}
	options, own := splitStorageOptions(st.Options)
	if err := mountStorage(s, st.Source, st.Fstype, options); err != nil {
		return err
	}
	return own.apply(s.point)
}

// attachLocal makes a directory of the guest's.
func attachLocal(_ context.Context, st *pb.Storage, s *storage) error {
	s.kept = true
	if err := os.MkdirAll(s.point, 0o755); err != nil {
		return err
	}
	options, own := splitStorageOptions(st.Options)
	return own.withMode(options).apply(s.point)
}

// attachOverlay mounts an overlay, and makes the directories first that the shim cannot make.
func attachOverlay(_ context.Context, st *pb.Storage, s *storage) error {
	for _, o := range st.DriverOptions {
		dir, ok := strings.CutPrefix(o, createDirectory)
		if !ok {
			continue
		}
		if filepath.Clean(dir) != dir || !strings.HasPrefix(dir, copyRoot+"/") {
			return invalid("overlay directory %q is not below %s", dir, copyRoot)
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		s.dirs = append(s.dirs, dir)
	}
	fstype, options := st.Fstype, st.Options
	for _, o := range st.Options {
		if o != writableOverlay {
			continue
		}
		if err := os.MkdirAll(overlays, 0o700); err != nil {
			return err
		}
		dir, err := os.MkdirTemp(overlays, "")
		if err != nil {
			return err
		}
		s.dirs = append(s.dirs, dir)
		upper, work := filepath.Join(dir, "upper"), filepath.Join(dir, "work")
		if err := errors.Join(os.Mkdir(upper, 0o755), os.Mkdir(work, 0o755)); err != nil {
			return err
		}
		fstype, options = "overlay", append(options[:len(options):len(options)], "upperdir="+upper, "workdir="+work)
	}
	return mountStorage(s, st.Source, fstype, options)
}

// attachBind puts a file or directory of the share at another place. A change shows at once, but
// nobody is notified of it, watchable or not: the host's file systems notify a guest of nothing.
func attachBind(_ context.Context, st *pb.Storage, s *storage) error {
	return bindStorage(s, st.Source, st.Options)
}

func mountStorage(s *storage, source, fstype string, options []string) error {
	if err := os.MkdirAll(s.point, 0o755); err != nil {
		return err
	}
	o := parseMountOptions(withoutRuntimeOptions(options))
	err := s.mount(source, s.point, fstype, o.flags(), o.data)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EROFS) {
		// A disk that cannot be written: as mount(8) does.
		err = s.mount(source, s.point, fstype, o.flags()|unix.MS_RDONLY, o.data)
	}
	if err != nil {
		return fmt.Errorf("mount %s %s with options %q: %w", fstype, source, options, err)
	}
	return nil
}

// bindStorage puts a file or directory at the mount point, with the options of a bind mount.
func bindStorage(s *storage, source string, options []string) error {
	o := parseMountOptions(withoutRuntimeOptions(options))
	m := plannedMount{target: s.point, source: source, opts: o, tree: -1}
	m.opts.recursive = true
	if err := m.open(); err != nil {
		return fmt.Errorf("bind %s: %w", source, err)
	}
	if _, err := makeMountpoint(m.target, m.dir); err != nil {
		unix.Close(m.tree)
		return err
	}
	if err := attachTree(m.tree, m.target, o.attr); err != nil {
		return fmt.Errorf("bind %s: %w", source, err)
	}
	s.mounts = append(s.mounts, m.target)
	return nil
}

func withoutRuntimeOptions(options []string) []string {
	var rest []string
	for _, o := range options {
		if !strings.HasPrefix(o, runtimeOptions) {
			rest = append(rest, o)
		}
	}
	return rest
}

// reserveHugePages sets aside the pages that a file system of them is to hold. sysfs has one
// directory for each size of page.
func reserveHugePages(sysfs string, options []string) error {
	var pageSize, size uint64
	for _, o := range strings.Split(strings.Join(options, ","), ",") {
		key, value, _ := strings.Cut(o, "=")
		n, err := strconv.ParseUint(value, 10, 63)
		switch key {
		case "pagesize":
			pageSize = n
		case "size":
			size = n
		default:
			continue
		}
		if err != nil {
			return invalid("huge pages: option %q", o)
		}
	}
	if pageSize < 1024 || size < pageSize {
		return invalid("huge pages of %d bytes, %d bytes in all", pageSize, size)
	}
	file := fmt.Sprintf("%s/hugepages-%dkB/nr_hugepages", sysfs, pageSize/1024)
	before, err := readNumber(file)
	if err != nil {
		return fmt.Errorf("huge pages of %d bytes: %w", pageSize, err)
	}
	want := before + size/pageSize
	if err := os.WriteFile(file, strconv.AppendUint(nil, want, 10), 0); err != nil {
		return fmt.Errorf("reserve huge pages: %w", err)
	}
	// The kernel takes any number and does what it can.
	got, err := readNumber(file)
	if err != nil {
		return err
	}
	if got < want {
		_ = os.WriteFile(file, strconv.AppendUint(nil, before, 10), 0)
		return fmt.Errorf("reserve huge pages: memory has room for %d of %d", got-before, want-before)
	}
	return nil
}

func readNumber(file string) (uint64, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
}
