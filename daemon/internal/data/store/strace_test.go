package store_test

import (
	"bufio"
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// call is a completed system call of a traced program.
type call struct {
	thread string
	name   string
	args   []string
	result int64
	// injected is set if strace made the call fail.
	injected bool
}

var (
	threadRE  = regexp.MustCompile(`^(\d+)<(.*?)> +`)
	callRE    = regexp.MustCompile(`^(\w+)\((.*)\) += (-?\d+)`)
	resumedRE = regexp.MustCompile(`^<\.\.\. \w+ resumed>(.*)$`)
)

// checkerComm is the command name in the kernel of the process that checks a store's file, which executes
// /proc/self/exe.
const checkerComm = "exe"

// trace runs cmd under strace with additional options. It returns the standard output of cmd and the system calls that
// open or change files, in the order in which they ended. It omits the calls of the process that checks a store's file,
// which only reads. If strace cannot trace, the test fails.
func trace(t testing.TB, cmd *exec.Cmd, options ...string) (stdout []byte, calls []call) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "strace.out")
	args := append([]string{"strace", "-f", "--seccomp-bpf", "-y", "-Y", "-xx", "-s", "1048576", "-e", "signal=none", "-o", out, "-e", "trace=" +
		"openat,pwrite64,write,fsync,fdatasync,rename,renameat,renameat2,ftruncate,fallocate,unlink,unlinkat"}, options...)
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Fatalf("this test needs strace: apt-get install strace: %v", err)
	}
	cmd.Args = append(append(args, cmd.Path), cmd.Args[1:]...)
	cmd.Path = strace
	var stderr strings.Builder
	cmd.Stderr = &stderr
	stdout, err = cmd.Output()
	if err != nil {
		t.Fatalf("run under strace (allow ptrace if it is forbidden here): %v\n%s", err, stderr.String())
	}
	file, err := os.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	begun := map[string]string{} // the call that has not ended, by thread
	lines := bufio.NewScanner(file)
	for lines.Buffer(nil, 16<<20); lines.Scan(); {
		line := lines.Text()
		thread := threadRE.FindStringSubmatch(line)
		if thread == nil {
			t.Fatalf("strace: %s", line)
		}
		if thread[2] == checkerComm {
			continue
		}
		line = line[len(thread[0]):]
		if before, ok := strings.CutSuffix(line, " <unfinished ...>"); ok {
			begun[thread[1]] = before
			continue
		}
		if m := resumedRE.FindStringSubmatch(line); m != nil {
			line = begun[thread[1]] + m[1]
		}
		m := callRE.FindStringSubmatch(line)
		if m == nil {
			continue // the process ended during the call, or the line reports the end of a thread
		}
		c := call{thread: thread[1], name: m[1]}
		for _, arg := range strings.Split(m[2], ", ") {
			c.args = append(c.args, unescape(arg))
		}
		c.injected = strings.HasSuffix(line, "(INJECTED)")
		if c.result, err = strconv.ParseInt(m[3], 10, 64); err != nil {
			t.Fatalf("strace: %s", line)
		}
		calls = append(calls, c)
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	if len(calls) == 0 {
		t.Fatalf("strace saw no call:\n%s", stderr.String())
	}
	return stdout, calls
}

// unescape decodes the escapes that the option -xx causes and removes the quotes.
func unescape(arg string) string {
	b := make([]byte, 0, len(arg)/4)
	for i := 0; i < len(arg); i++ {
		if arg[i] == '\\' && i+3 < len(arg) && arg[i+1] == 'x' {
			n, _ := strconv.ParseUint(arg[i+2:i+4], 16, 8)
			b = append(b, byte(n))
			i += 3
		} else {
			b = append(b, arg[i])
		}
	}
	if len(b) >= 2 && arg[0] == '"' {
		b = b[1 : len(b)-1]
	}
	return string(b)
}

// fd splits the first argument, which the option -y prints as 3</path>.
func (c call) fd(t testing.TB) (n int, path string) {
	t.Helper()
	number, path, _ := strings.Cut(c.args[0], "<")
	n, err := strconv.Atoi(number)
	if err != nil {
		t.Fatalf("strace: %s of %q", c.name, c.args[0])
	}
	return n, trimPath(path)
}

func trimPath(path string) string {
	return strings.TrimSuffix(strings.TrimSuffix(path, "(deleted)"), ">")
}

// file returns the name of the file in dir that a call refers to, which may be dir itself.
func (c call) file(dir string) (name string, ok bool) {
	for _, arg := range c.args {
		_, path, isFD := strings.Cut(arg, "<")
		if !isFD {
			path = arg
		}
		path = trimPath(path)
		if path == dir || filepath.Dir(path) == dir {
			return filepath.Base(path), true
		}
	}
	return "", false
}

// lines returns the number of lines that a call wrote to the standard output.
func (c call) lines() int {
	if c.name != "write" || !strings.HasPrefix(c.args[0], "1<") {
		return 0
	}
	return strings.Count(c.args[1], "\n")
}

func (c call) number(t testing.TB, arg int) int64 {
	t.Helper()
	n, err := strconv.ParseInt(c.args[arg], 0, 64)
	if err != nil {
		t.Fatalf("strace: %s with %q", c.name, c.args[arg])
	}
	return n
}

// disk is a directory as a program sees it, together with what would survive a power loss: everything that was synced,
// and any part of the rest.
type disk struct {
	dir   string
	names map[string]*inode
	// durable is like names, but without the changes in pending, which were not synced.
	durable map[string]*inode
	pending []func(names map[string]*inode)
	open    map[int]*openFile
}

type inode struct {
	content []byte
	durable []byte
	pending []update // the updates that lead from durable to content
}

// update writes data at an offset. If data is nil, it sets the length of the file to at.
type update struct {
	at   int64
	data []byte
}

type openFile struct {
	*inode
	at     int64
	append bool
}

func newDisk(dir string, files map[string][]byte) *disk {
	d := &disk{dir: dir, names: map[string]*inode{}, open: map[int]*openFile{}}
	for name, content := range files {
		d.names[name] = &inode{content: content, durable: content}
	}
	d.durable = maps.Clone(d.names)
	return d
}

// apply applies the effect of a call to d. It reports whether the call changed or synced a file of the directory.
func (d *disk) apply(t testing.TB, c call) bool {
	t.Helper()
	if c.result < 0 {
		if f := d.openFile(t, c); f != nil && strings.HasSuffix(c.name, "sync") {
			f.pending = nil // the kernel does not write these updates again, although they can still be read
		}
		return false
	}
	switch c.name {
	case "openat":
		path, flags := c.args[1], c.args[2]
		delete(d.open, int(c.result))
		name, ok := d.name(path)
		if !ok || strings.Contains(flags, "O_TMPFILE") {
			return false
		}
		node := d.names[name]
		created := node == nil
		if created {
			node = new(inode)
			d.rename(func(names map[string]*inode) { names[name] = node })
		}
		if strings.Contains(flags, "O_TRUNC") {
			node.update(update{})
		}
		d.open[int(c.result)] = &openFile{inode: node, append: strings.Contains(flags, "O_APPEND")}
		return created
	case "write", "pwrite64", "ftruncate", "fsync", "fdatasync":
		if _, path := c.fd(t); path == d.dir && c.name == "fsync" {
			d.durable, d.pending = maps.Clone(d.names), nil
			return true
		}
		f := d.openFile(t, c)
		if f == nil {
			return false
		}
		switch c.name {
		case "ftruncate":
			f.update(update{at: c.number(t, 1)})
		case "pwrite64":
			f.update(update{c.number(t, 3), []byte(c.args[1])[:c.result]})
		case "write":
			if f.append {
				f.at = int64(len(f.content))
			}
			f.update(update{f.at, []byte(c.args[1])[:c.result]})
			f.at += c.result
		default:
			for _, u := range f.pending {
				f.durable = u.applied(bytes.Clone(f.durable))
			}
			f.pending = nil
		}
		return true
	case "rename", "renameat", "renameat2":
		var paths []string
		for _, arg := range c.args {
			if strings.HasPrefix(arg, "/") {
				paths = append(paths, arg)
			}
		}
		from, ok1 := d.name(paths[0])
		to, ok2 := d.name(paths[1])
		if ok1 && ok2 {
			d.rename(func(names map[string]*inode) { names[to] = names[from]; delete(names, from) })
		}
		return ok1 && ok2
	case "unlink", "unlinkat":
		for _, arg := range c.args {
			if name, ok := d.name(arg); ok {
				d.rename(func(names map[string]*inode) { delete(names, name) })
				return true
			}
		}
	}
	return false
}

// openFile returns the file of the directory that is the first argument of a call, or nil.
func (d *disk) openFile(t testing.TB, c call) *openFile {
	t.Helper()
	switch c.name {
	case "write", "pwrite64", "ftruncate", "fsync", "fdatasync":
		fd, _ := c.fd(t)
		return d.open[fd]
	}
	return nil
}

// name returns the last element of path, and whether the path is directly in the directory.
func (d *disk) name(path string) (string, bool) {
	return filepath.Base(path), filepath.Dir(path) == d.dir
}

func (d *disk) rename(change func(names map[string]*inode)) {
	change(d.names)
	d.pending = append(d.pending, change)
}

func (n *inode) update(u update) {
	n.content = u.applied(bytes.Clone(n.content))
	n.pending = append(n.pending, u)
}

func (u update) applied(b []byte) []byte {
	end := u.at + int64(len(u.data))
	if grow := end - int64(len(b)); grow > 0 {
		b = append(b, make([]byte, grow)...)
	}
	if u.data == nil {
		return b[:end]
	}
	copy(b[u.at:], u.data)
	return b
}

const sector = 512

// image returns a possible content of the directory after a power loss: everything that was synced and, of the rest,
// all, nothing, or random parts if random is not nil. The random parts are the names as they were at one moment, and any
// sectors of each file.
func (d *disk) image(all bool, random *rand.Rand) map[string][]byte {
	names := maps.Clone(d.durable)
	n := 0
	switch {
	case all:
		n = len(d.pending)
	case random != nil:
		n = random.IntN(len(d.pending) + 1)
	}
	for _, change := range d.pending[:n] {
		change(names)
	}
	image := make(map[string][]byte, len(names))
	for name, node := range names {
		switch {
		case all:
			image[name] = node.content
		case random == nil:
			image[name] = node.durable
		default:
			image[name] = node.torn(random)
		}
	}
	return image
}

// torn returns the durable content with some of the pending updates: the first ones completely, then random sectors.
func (n *inode) torn(random *rand.Rand) []byte {
	b := bytes.Clone(n.durable)
	complete := random.IntN(len(n.pending) + 1)
	for i, u := range n.pending {
		if i < complete || u.data == nil && random.IntN(2) == 0 {
			b = u.applied(b)
			continue
		}
		for at := u.at; at < u.at+int64(len(u.data)); {
			next := min(at/sector*sector+sector, u.at+int64(len(u.data)))
			if random.IntN(2) == 0 {
				b = update{at, u.data[at-u.at : next-u.at]}.applied(b)
			}
			at = next
		}
	}
	return b
}

// writeFiles writes the files of an image to an empty directory.
func writeFiles(t testing.TB, dir string, image map[string][]byte) {
	t.Helper()
	for name, content := range image {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func (c call) String() string {
	args := strings.Join(c.args, ", ")
	return fmt.Sprintf("%s(%.120q) = %d", c.name, args, c.result)
}
