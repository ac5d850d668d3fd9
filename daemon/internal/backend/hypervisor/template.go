package hypervisor

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/backend/disk"
	"github.com/msbd/msbd/daemon/internal/sys/ctxio"
	"github.com/msbd/msbd/daemon/internal/sys/durable"
)

// A template is the saved state of a VM whose container's main process, the portal, was ready. No code of a client has run
// in it. A clone of the template continues from this state, so it does not boot. Clones share the memory that they do not
// change.
//
// A template is kept in memory, and in a directory from which it is read again after a restart of msbd:
//
//	KEY/memory     the memory of the guest, with holes
//	KEY/state      the state of the devices, in the format of QEMU's migration
//	KEY/upper      the writable disk, with holes
//	KEY/meta.json  templateMeta
//
// A directory whose name ends in .new is incomplete. KEY is a hash of everything on which the template depends: the programs
// and the host (hostKey), and the size, the image and the container of the VM (templateKey). It is computed for each VM, so a
// template is not used for programs or an image that were replaced while msbd runs.
//
// In all clones of a template, the kernel and the programs that the template had are at the same addresses. So that this is
// not so for long, a template is used for at most MaxTemplateAge.

// MaxTemplateAge is the age at which a template is no longer used, and is built again.
const MaxTemplateAge = 24 * time.Hour

// minTemplateRest is how long a template must not have been used before another one takes its place. Otherwise, a server on which
// more kinds of sandboxes than max are started in turns would build templates all the time, and use none of them.
const minTemplateRest = time.Hour

// ErrTemplatesInUse is the error of the build of a template for which there is no place.
var ErrTemplatesInUse = errors.New("all templates that this server may keep are in use; raise max_templates to keep more")

// maxTemplateFailures is the number of clones that could not be started after which their template is removed.
const maxTemplateFailures = 2

// The files of a template.
const (
	memoryFile = "memory"
	rawState   = "state"
	upperCopy  = "upper"
	metaFile   = "meta.json"
)

// templateMeta describes a template.
type templateMeta struct {
	// Key is the name of the template's directory.
	Key string `json:"key"`
	// Host is the hostKey of the time at which the template was built. Key depends on it as well.
	Host string `json:"host"`
	// Image is the image of the sandbox (Spec.Image).
	Image string `json:"image"`
	// Keep is Spec.KeepTemplate.
	Keep  bool      `json:"keep,omitempty"`
	Built time.Time `json:"built"`
	// Checksums are the checksums of the files by name, as copyData calculates them.
	Checksums map[string]string `json:"checksums"`
	// Sizes are the sizes of the files in bytes, by name.
	Sizes map[string]int64 `json:"sizes"`
}

// A template is what the VMs that are its clones begin with. Its files are in memory, and sealed (see memfile.go).
type template struct {
	memory, state *os.File
	upper         disk.Extents
}

func (t *template) close() {
	t.memory.Close()
	t.state.Close()
}

// templates are the templates of a Service.
type templates struct {
	dir string // where they are stored
	max int    // how many are kept; if it is 0, there are none, and the other fields are not set
	log *slog.Logger

	mu    sync.Mutex
	known []*knownTemplate // the one used last is first
}

// A knownTemplate is a template that is stored in its directory, or the place of one that is being built.
type knownTemplate struct {
	templateMeta
	*template            // nil until it was built, or read from its directory
	reading   sync.Mutex // held by the start that reads it
	building  bool       // it is not complete
	used      time.Time  // when a clone was last started, or it was built or found by this server
	failures  int        // of its clones
}

// find returns the template with this key, or nil and the reason why it cannot be used. The caller must close the template. If
// the template was not used since the start of msbd, find first reads its files, which takes some tenths of a second.
func (ts *templates) find(ctx context.Context, key string) (t *template, why string) {
	if ts.max == 0 {
		return nil, "this server keeps no templates"
	}
	k, why := ts.usable(key)
	if k == nil {
		return nil, why
	}
	if err := ts.ensureRead(ctx, k); err != nil {
		ts.log.Warn("could not read a template", "template", key, "err", err)
		return nil, "the template could not be read"
	}
	ts.mu.Lock()
	defer ts.mu.Unlock()
	i := slices.Index(ts.known, k)
	if i < 0 {
		return nil, "the template was removed"
	}
	copied := *k.template
	var err error
	if copied.memory, err = reopen(k.memory, os.O_RDWR); err == nil {
		if copied.state, err = reopen(k.state, os.O_RDONLY); err != nil {
			copied.memory.Close()
		}
	}
	if err != nil {
		ts.log.Warn("could not open a template", "template", key, "err", err)
		return nil, "the template could not be opened"
	}
	k.used = time.Now()
	ts.known = slices.Insert(slices.Delete(ts.known, i, i+1), 0, k)
	return &copied, ""
}

// usable returns the template with this key, which may have to be read, or nil and the reason why it cannot be used.
func (ts *templates) usable(key string) (k *knownTemplate, why string) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	i := ts.index(key)
	switch {
	case i < 0 || ts.known[i].building:
		return nil, "there is no template yet"
	case !isRecent(ts.known[i].Built):
		return nil, "the template is too old"
	}
	return ts.known[i], ""
}

// ensureRead reads the files of k, unless that was done or k was removed. Meanwhile, other callers wait only if they need k. If the
// files are damaged, ensureRead removes k.
func (ts *templates) ensureRead(ctx context.Context, k *knownTemplate) error {
	k.reading.Lock()
	defer k.reading.Unlock()
	ts.mu.Lock()
	needed := k.template == nil && slices.Contains(ts.known, k)
	ts.mu.Unlock()
	if !needed {
		return nil
	}
	read, err := k.read(ctx, filepath.Join(ts.dir, k.Key))
	ts.mu.Lock()
	defer ts.mu.Unlock()
	i := slices.Index(ts.known, k)
	switch {
	case i < 0 && err == nil:
		read.close()
	case i < 0: // its files were removed
		return nil
	case errors.Is(err, errDamaged):
		ts.log.Error("removing a template that is damaged; it is built again", "template", k.Key, "err", err)
		ts.remove(i)
	case err == nil:
		k.template = read
	}
	return err
}

// index returns the index of the template with this key, or -1. The caller holds mu.
func (ts *templates) index(key string) int {
	return slices.IndexFunc(ts.known, func(k *knownTemplate) bool { return k.Key == key })
}

// built returns when the template with this key was built. It is the zero time if there is none, or if it is too old.
func (ts *templates) built(key string) time.Time {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if i := ts.index(key); i >= 0 && !ts.known[i].building && isRecent(ts.known[i].Built) {
		return ts.known[i].Built
	}
	return time.Time{}
}

// errDamaged is the class of errors about a template whose files are not what was stored.
var errDamaged = errors.New("the template is damaged")

// isRecent reports whether a template that was built at this time may be used. The host's clock may have been set back since.
func isRecent(built time.Time) bool {
	age := time.Since(built)
	return age >= 0 && age <= MaxTemplateAge
}

// worked records that a clone of the template with this key has started.
func (ts *templates) worked(key string) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if i := ts.index(key); i >= 0 {
		ts.known[i].failures = 0
	}
}

// failed records that a clone of the template with this key could not be started. It removes the template after
// maxTemplateFailures of them.
func (ts *templates) failed(key string) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	i := ts.index(key)
	if i < 0 {
		return
	}
	if ts.known[i].failures++; ts.known[i].failures >= maxTemplateFailures {
		ts.log.Error("removing a template whose clones fail; it is built again", "template", key, "failures", ts.known[i].failures)
		ts.remove(i)
	}
}

// remove removes the template with index i. The caller holds mu. Clones of it continue to run, because their QEMU has its own
// descriptor of the memory.
func (ts *templates) remove(i int) {
	k := ts.known[i]
	if k.template != nil {
		k.close()
	}
	ts.known = slices.Delete(ts.known, i, i+1)
	_ = os.RemoveAll(filepath.Join(ts.dir, k.Key)) // what remains is noticed by its checksums
}

// prune removes all templates except those of the images keep, also those that are being built.
func (ts *templates) prune(keep []string) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	for i := len(ts.known) - 1; i >= 0; i-- {
		if !slices.Contains(keep, ts.known[i].Image) {
			ts.remove(i)
		}
	}
}

// reserve takes a place for a template that is to be built: that of an older one with the same key, or a free one, or that of the
// one that was used longest ago. A template that is kept takes the place of any that is not, and otherwise only a template that was
// not used for minTemplateRest makes room. reserve removes the older template. If there is no place, it returns
// ErrTemplatesInUse. The caller must call add, or release.
func (ts *templates) reserve(meta templateMeta) (*knownTemplate, error) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	i := ts.index(meta.Key)
	if i < 0 && len(ts.known) >= ts.max {
		for last, k := range slices.Backward(ts.known) {
			if !k.building && (meta.Keep && !k.Keep || meta.Keep == k.Keep && time.Since(k.used) >= minTemplateRest) {
				i = last
				break
			}
		}
		if i < 0 {
			return nil, ErrTemplatesInUse
		}
	}
	if i >= 0 {
		ts.remove(i)
	}
	k := &knownTemplate{templateMeta: meta, building: true}
	ts.known = slices.Insert(ts.known, 0, k)
	return k, nil
}

// release gives up a place if it still is that of a template that is being built.
func (ts *templates) release(k *knownTemplate) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if i := slices.Index(ts.known, k); i >= 0 && k.building {
		ts.remove(i)
	}
}

// removeOld removes the templates that are too old to be used.
func (ts *templates) removeOld() {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	for i, k := range slices.Backward(ts.known) {
		if !k.building && !isRecent(k.Built) {
			ts.log.Info("removing a template that is too old", "template", k.Key)
			ts.remove(i)
		}
	}
}

// add stores t, whose place is k and whose writable disk is upper, and makes it usable. It takes over t unless it returns an error.
func (ts *templates) add(ctx context.Context, k *knownTemplate, t *template, upper *os.File) (err error) {
	meta := k.templateMeta
	dir := filepath.Join(ts.dir, meta.Key)
	work := dir + ".new"
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("store the template: %w", err), os.RemoveAll(work))
		}
	}()
	if err := store(ctx, work, &meta, t, upper); err != nil {
		return err
	}
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if !slices.Contains(ts.known, k) {
		return errors.New("its image was removed meanwhile")
	}
	if err := os.RemoveAll(dir); err != nil { // remove may have failed
		return err
	}
	if err := os.Rename(work, dir); err != nil {
		return err
	}
	k.templateMeta, k.template, k.building, k.used = meta, t, false, time.Now()
	return nil
}

// store writes t to the directory work, which it creates. It sets the checksums and sizes in meta.
func store(ctx context.Context, work string, meta *templateMeta, t *template, upper *os.File) error {
	if err := os.RemoveAll(work); err != nil {
		return err
	}
	if err := os.Mkdir(work, 0o700); err != nil {
		return err
	}
	meta.Checksums, meta.Sizes = map[string]string{}, map[string]int64{}
	for name, from := range map[string]*os.File{memoryFile: t.memory, rawState: t.state, upperCopy: upper} {
		to, err := os.OpenFile(filepath.Join(work, name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		meta.Sizes[name], meta.Checksums[name], err = copyData(ctx, to, from)
		if err = errors.Join(err, to.Close()); err != nil {
			return err
		}
	}
	data, err := json.Marshal(meta)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(work, metaFile), data, 0o600)
}

// load finds the templates in the directory, without reading their memory. It removes those that cannot be used (see readMeta),
// and those beyond max. host is the hostKey.
func (ts *templates) load(host string) error {
	entries, err := os.ReadDir(ts.dir)
	if err != nil {
		return fmt.Errorf("find templates: %w", err)
	}
	for _, e := range entries {
		meta, err := ts.readMeta(e.Name(), host)
		if err == nil && len(ts.known) < ts.max {
			ts.known = append(ts.known, &knownTemplate{templateMeta: meta, used: time.Now()})
			continue
		}
		ts.log.Info("removing a template that is not used any more", "template", e.Name(), "why", err)
		if err := os.RemoveAll(filepath.Join(ts.dir, e.Name())); err != nil {
			return fmt.Errorf("remove a template: %w", err)
		}
	}
	return nil
}

// readMeta reads the description of the template with this key. It returns an error that says why if the template is
// incomplete, too old, or was built with other programs or before the host's last start.
func (ts *templates) readMeta(key, host string) (meta templateMeta, err error) {
	data, err := os.ReadFile(filepath.Join(ts.dir, key, metaFile))
	switch {
	case err != nil:
	case json.Unmarshal(data, &meta) != nil || meta.Key != key:
		err = errors.New("its description is damaged, or it is not complete")
	case meta.Host != host:
		err = errors.New("it was built for another version of msbd, of its programs or of the host's system, or before the host's last start")
	case !isRecent(meta.Built):
		err = errors.New("it is too old")
	}
	return meta, err
}

// read reads the files of the template from dir, and compares them with their checksums.
func (meta *templateMeta) read(ctx context.Context, dir string) (_ *template, err error) {
	t := &template{}
	var upper *os.File
	defer func() {
		if upper != nil {
			upper.Close()
		}
		for _, f := range []*os.File{t.memory, t.state} {
			if err != nil && f != nil {
				f.Close()
			}
		}
	}()
	for name, to := range map[string]**os.File{memoryFile: &t.memory, rawState: &t.state, upperCopy: &upper} {
		if *to, err = readSealed(ctx, filepath.Join(dir, name), meta.Sizes[name], meta.Checksums[name]); err != nil {
			return nil, err
		}
	}
	t.upper, err = disk.ReadExtents(upper, maxDiskData)
	return t, err
}

// readSealed returns a sealed file in memory with the content of the file path, which must have this size and checksum.
func readSealed(ctx context.Context, path string, size int64, checksum string) (_ *os.File, err error) {
	from, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", errDamaged, err)
	}
	if err != nil {
		return nil, err
	}
	defer from.Close()
	info, err := from.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != size {
		return nil, fmt.Errorf("%w: its file %s has %d bytes, not %d", errDamaged, filepath.Base(path), info.Size(), size)
	}
	to, err := newMemFile(filepath.Base(path), size)
	if err != nil {
		return nil, err
	}
	_, sum, err := copyData(ctx, to, from)
	if err == nil && sum != checksum {
		err = fmt.Errorf("%w: the checksum of its file %s is wrong", errDamaged, filepath.Base(path))
	}
	if err == nil {
		err = seal(to)
	}
	if err != nil {
		to.Close()
		return nil, err
	}
	return to, nil
}

// block is the unit in which copyData looks for zeros, in bytes.
const block = 64 << 10

// copyData copies from, a file, to the empty file to, and leaves holes in place of blocks of zeros. It returns the size of from
// in bytes and a checksum: the SHA-256 sum of the size, and of the position and the data of each block that is not all zeros.
// The checksum does not depend on where from has holes.
func copyData(ctx context.Context, to, from *os.File) (size int64, checksum string, err error) {
	info, err := from.Stat()
	if err != nil {
		return 0, "", err
	}
	size = info.Size()
	if err := to.Truncate(size); err != nil {
		return 0, "", err
	}
	sum := sha256.New()
	fmt.Fprintf(sum, "%d\n", size)
	zero, buffer := make([]byte, block), make([]byte, block)
	next := int64(0) // the offset of the first block that was not copied yet
	err = disk.EachExtent(from, func(offset, length int64) error {
		for at := max(next, offset/block*block); at < offset+length; at += block {
			data := buffer[:min(block, size-at)]
			if _, err := io.ReadFull(ctxio.Reader(ctx, io.NewSectionReader(from, at, int64(len(data)))), data); err != nil {
				return err
			}
			next = at + block
			if string(data) == string(zero[:len(data)]) {
				continue
			}
			fmt.Fprintf(sum, "%d\n", at)
			sum.Write(data)
			if _, err := to.WriteAt(data, at); err != nil {
				return err
			}
		}
		return nil
	})
	return size, hex.EncodeToString(sum.Sum(nil)), err
}

// hostKey returns a hash of what all templates depend on: QEMU, the guest's kernel and initramfs, the accelerator, and the last
// start of the host. After a start, the host may have another kernel or another processor. The number at the beginning is for
// changes of how templates are built.
func hostKey(cfg Config) (string, error) {
	sum := sha256.New()
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	fmt.Fprintf(sum, "2\n%s\n%s\n", boot, cfg.Accelerator)
	for _, path := range []string{cfg.QEMU, cfg.Kernel, cfg.Initrd} {
		id, err := identify(path)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(sum, "%s %s\n", path, id)
	}
	return encodeKey(sum), nil
}

// identify returns what changes when a file is replaced or written. It does not change for a hard link.
func identify(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", fmt.Errorf("identify %s: %w", path, err)
	}
	return fmt.Sprint(st.Dev, st.Ino, st.Size, st.Mtim.Nano()), nil
}

// encodeKey returns the first half of a SHA-256 sum in hexadecimal.
func encodeKey(sum hash.Hash) string { return hex.EncodeToString(sum.Sum(nil)[:16]) }

// templateKey returns the key of the template for spec: the VM that spec describes can only be a clone of this one. It also
// returns the hostKey.
//
// The image's disk is identified by its file as well. A disk that is built again for the same image has other data at the same
// places, for example because of times or a new mkfs.erofs, and the memory of a template may hold parts of the disk it had.
//
// The frequency of the time stamp counter is left out: each start of msbd measures it again, with a result that differs a little.
func (s *Service) templateKey(spec Spec) (key, host string, err error) {
	upper, err := os.Stat(spec.Disks.Upper)
	if err != nil {
		return "", "", err
	}
	image, err := identify(spec.Disks.Image)
	if err == nil {
		host, err = hostKey(s.cfg)
	}
	if err != nil {
		return "", "", err
	}
	command := s.qemuCommand(state{VCPUs: spec.VCPUs, MemoryMiB: spec.MemoryMiB}, memory{file: os.Stdin})
	for i := range command {
		command[i] = strings.Replace(command[i], tscArgument(), "", 1)
	}
	sum := sha256.New()
	err = json.NewEncoder(sum).Encode([]any{host, command, spec.Image, image, upper.Size(), templateContainer(spec.Container)})
	return encodeKey(sum), host, err
}

// templateContainer returns the part of a container's spec that must be the same in a template and its clones. The guest's
// agent changes the rest when the container of a clone takes over the one of the template.
func templateContainer(container *specs.Spec) *specs.Spec {
	common := *container
	common.Hostname, common.Annotations = "", nil
	if container.Linux != nil {
		linux := *container.Linux
		linux.CgroupsPath = ""
		common.Linux = &linux
	}
	return &common
}
