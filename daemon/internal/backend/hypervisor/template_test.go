package hypervisor

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const testHost = "this host"

// newTemplates returns templates in a directory of the test.
func newTemplates(t *testing.T, limit int) *templates {
	t.Helper()
	return &templates{dir: t.TempDir(), max: limit, log: slog.New(slog.DiscardHandler)}
}

// testMemory is the memory of a template: a block, a hole, some zeros, and a block that is not aligned.
func testMemory() []byte {
	memory := make([]byte, 1<<20+100)
	copy(memory, strings.Repeat("kernel ", 10_000))
	copy(memory[700_000:], strings.Repeat("page ", 30_000))
	copy(memory[1<<20:], "the end")
	return memory
}

// addTemplate stores a template and makes it usable.
func addTemplate(t *testing.T, ts *templates, key string) {
	t.Helper()
	place, err := ts.reserve(templateMeta{Key: key, Host: testHost, Image: "image of " + key, Built: time.Now()})
	if err == nil {
		err = fillPlace(t, ts, place)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// makeTemplate returns a template without a disk, which is not sealed yet. The caller must close it.
func makeTemplate(t *testing.T, key string) *template {
	t.Helper()
	made := &template{}
	for name, f := range map[string]struct {
		to   **os.File
		data []byte
	}{memoryFile: {&made.memory, testMemory()}, rawState: {&made.state, []byte("state of " + key)}} {
		file, err := newMemFile(name, int64(len(f.data)))
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(f.data); i += 4096 { // leave holes
			if page := f.data[i:min(i+4096, len(f.data))]; bytes.Trim(page, "\x00") != nil {
				if _, err := file.WriteAt(page, int64(i)); err != nil {
					t.Fatal(err)
				}
			}
		}
		*f.to = file
	}
	return made
}

// fillPlace stores the template of a place, and makes it usable.
func fillPlace(t *testing.T, ts *templates, place *knownTemplate) error {
	t.Helper()
	key, made := place.Key, makeTemplate(t, place.Key)
	if err := errors.Join(seal(made.memory), seal(made.state)); err != nil {
		t.Fatal(err)
	}
	upper, err := os.Create(filepath.Join(t.TempDir(), "upper"))
	if err != nil {
		t.Fatal(err)
	}
	defer upper.Close()
	if _, err := upper.WriteAt([]byte("disk of "+key), 1<<20); err != nil {
		t.Fatal(err)
	}
	err = ts.add(t.Context(), place, made, upper)
	if err != nil {
		made.close()
	}
	return err
}

// restart returns the templates that a Service finds after a restart.
func restart(t *testing.T, ts *templates) (*templates, *safeBuffer) {
	t.Helper()
	log := &safeBuffer{}
	again := &templates{dir: ts.dir, max: ts.max, log: slog.New(slog.NewTextHandler(log, nil))}
	if err := again.load(testHost); err != nil {
		t.Fatal(err)
	}
	return again, log
}

// mustFind returns the template with this key.
func mustFind(t *testing.T, ts *templates, key string) *template {
	t.Helper()
	found, why := ts.find(t.Context(), key)
	if found == nil {
		t.Fatalf("template %s: %s", key, why)
	}
	t.Cleanup(found.close)
	return found
}

func TestTemplatesSurviveRestart(t *testing.T) {
	ts := newTemplates(t, 2)
	addTemplate(t, ts, "a")
	again, _ := restart(t, ts)
	for name, ts := range map[string]*templates{"before": ts, "after": again} {
		found := mustFind(t, ts, "a")
		memory, err := io.ReadAll(found.memory)
		if err != nil || !bytes.Equal(memory, testMemory()) {
			t.Errorf("%s: the memory has changed: %v", name, err)
		}
		state, err := io.ReadAll(found.state)
		if err != nil || string(state) != "state of a" {
			t.Errorf("%s: state %q, %v", name, state, err)
		}
	}
	upper, err := os.Create(filepath.Join(t.TempDir(), "upper"))
	if err != nil {
		t.Fatal(err)
	}
	defer upper.Close()
	writeFile(t, upper.Name(), strings.Repeat("old", 1<<20))
	if err := replaceContent(upper, mustFind(t, again, "a").upper); err != nil {
		t.Fatal(err)
	}
	disk, err := os.ReadFile(upper.Name())
	if err != nil || len(disk) != 3<<20 || strings.TrimSpace(string(bytes.ReplaceAll(disk, []byte{0}, nil))) != "disk of a" {
		t.Errorf("the copy of the disk is not that of the template: %v", err)
	}
}

// Nobody can change the memory of a template, which other clones map: not even who may open it for writing.
func TestTemplateMemoryIsFinal(t *testing.T) {
	ts := newTemplates(t, 1)
	addTemplate(t, ts, "a")
	again, _ := restart(t, ts)
	for name, ts := range map[string]*templates{"built": ts, "loaded": again} {
		file := mustFind(t, ts, "a").memory
		if _, err := file.WriteAt([]byte("x"), 0); err == nil {
			t.Errorf("%s: a write succeeded", name)
		}
		if err := file.Truncate(0); err == nil {
			t.Errorf("%s: a truncation succeeded", name)
		}
		fd := int(file.Fd())
		if err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096); err == nil {
			t.Errorf("%s: a hole was punched", name)
		}
		if _, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
			t.Errorf("%s: a shared writable mapping succeeded", name)
		}
		private, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		private[0] = 'X'
		if err := unix.Munmap(private); err != nil {
			t.Fatal(err)
		}
		if data := make([]byte, 6); readAt(t, file, data) != "kernel" {
			t.Errorf("%s: the memory is now %q", name, data)
		}
	}
}

func readAt(t *testing.T, file *os.File, data []byte) string {
	t.Helper()
	if _, err := file.ReadAt(data, 0); err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// A template whose files are not what was stored is removed at the next start of msbd.
func TestDamagedTemplates(t *testing.T) {
	flip := func(name string, at int64) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			file, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			var b [1]byte
			if _, err := file.ReadAt(b[:], at); err != nil {
				t.Fatal(err)
			}
			b[0] ^= 1
			if _, err := file.WriteAt(b[:], at); err != nil {
				t.Fatal(err)
			}
		}
	}
	replaceMeta := func(old, replacement string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			path := filepath.Join(dir, metaFile)
			meta, err := os.ReadFile(path)
			if err != nil || !strings.Contains(string(meta), old) {
				t.Fatalf("no %q in %s, %v", old, meta, err)
			}
			writeFile(t, path, strings.Replace(string(meta), old, replacement, 1))
		}
	}
	for name, damage := range map[string]func(t *testing.T, dir string){
		"memory changed":   flip(memoryFile, 700_000),
		"hole changed":     flip(memoryFile, 300_000),
		"state changed":    flip(rawState, 3),
		"disk changed":     flip(upperCopy, 1<<20),
		"memory truncated": func(t *testing.T, dir string) { _ = os.Truncate(filepath.Join(dir, memoryFile), 1<<19) },
		"memory zeroed": func(t *testing.T, dir string) {
			writeFile(t, filepath.Join(dir, memoryFile), string(make([]byte, 1<<20+100)))
		},
		"state missing":     func(t *testing.T, dir string) { _ = os.Remove(filepath.Join(dir, rawState)) },
		"no description":    func(t *testing.T, dir string) { _ = os.Remove(filepath.Join(dir, metaFile)) },
		"description empty": func(t *testing.T, dir string) { writeFile(t, filepath.Join(dir, metaFile), "") },
		"another key":       replaceMeta(`"key":"a"`, `"key":"b"`),
		"another host":      replaceMeta(testHost, "another host"),
		"too old":           replaceMeta(`"built":"20`, `"built":"19`),
		"incomplete":        func(t *testing.T, dir string) { _ = os.Rename(dir, dir+".new") },
	} {
		t.Run(name, func(t *testing.T) {
			ts := newTemplates(t, 2)
			addTemplate(t, ts, "a")
			addTemplate(t, ts, "good")
			damage(t, filepath.Join(ts.dir, "a"))
			again, log := restart(t, ts)
			if found, _ := again.find(t.Context(), "a"); found != nil {
				t.Error("the template is used")
			}
			mustFind(t, again, "good")
			if entries, err := os.ReadDir(ts.dir); err != nil || len(entries) != 1 {
				t.Errorf("the directory has %v, %v", entries, err)
			}
			if !strings.Contains(log.String(), "removing a template") {
				t.Errorf("log: %s", log)
			}
		})
	}
}

// The templates that were not used for a while make room for others, and those that are not kept also for those that are.
func TestTemplatesMakeRoom(t *testing.T) {
	ts := newTemplates(t, 2)
	has := func(keys ...string) {
		t.Helper()
		var have []string
		for _, k := range ts.known {
			have = append(have, k.Key)
		}
		if slices.Sort(have); !slices.Equal(have, keys) {
			t.Errorf("there are the templates %q, want %q", have, keys)
		}
		if entries, err := os.ReadDir(ts.dir); err != nil || len(entries) != len(keys) {
			t.Errorf("the directory has %v, %v", entries, err)
		}
	}
	build := func(key string, keep bool, want error) {
		t.Helper()
		place, err := ts.reserve(templateMeta{Key: key, Keep: keep, Built: time.Now()})
		if !errors.Is(err, want) {
			t.Fatalf("the place of %s: %v, want %v", key, err, want)
		}
		if err == nil {
			if err := fillPlace(t, ts, place); err != nil {
				t.Fatal(err)
			}
		}
	}
	rest := func(key string) { ts.known[ts.index(key)].used = time.Now().Add(-minTemplateRest) }
	build("a", false, nil)
	build("b", false, nil)
	build("c", false, ErrTemplatesInUse)
	build("a", false, nil) // in place of itself
	has("a", "b")
	rest("a")
	rest("b")
	mustFind(t, ts, "b")
	build("c", false, nil)
	has("b", "c")
	build("kept", true, nil)
	has("c", "kept")
	rest("kept")
	build("d", false, ErrTemplatesInUse)
	build("kept too", true, nil)
	has("kept", "kept too")
	build("kept as well", true, nil)
	has("kept as well", "kept too")
	build("one too many", true, ErrTemplatesInUse)
	has("kept as well", "kept too")
	place, err := ts.reserve(templateMeta{Key: "kept too", Keep: true})
	if err != nil {
		t.Fatal(err)
	}
	ts.release(place) // the build has failed
	has("kept as well")
	if found, why := ts.find(t.Context(), "kept too"); found != nil || why != "there is no template yet" {
		t.Errorf("a template whose build has failed: %v, %s", found, why)
	}
	build("e", false, nil)
	has("e", "kept as well")
}

// A template whose image is removed while it is built is not used.
func TestPruneDuringBuild(t *testing.T) {
	ts := newTemplates(t, 2)
	place, err := ts.reserve(templateMeta{Key: "a", Host: testHost, Image: "image", Built: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	if found, _ := ts.find(t.Context(), "a"); found != nil || !ts.built("a").IsZero() {
		t.Error("a template that is being built is used")
	}
	ts.prune(nil)
	wantError(t, fillPlace(t, ts, place), "its image was removed meanwhile")
	ts.release(place)
	if entries, err := os.ReadDir(ts.dir); err != nil || len(entries) != 0 || len(ts.known) != 0 {
		t.Errorf("left: %v, %v, %v", entries, err, ts.known)
	}
}

// The memory of a template that is too old is freed, also if nobody asks for a clone of it.
func TestOldTemplatesFreeMemory(t *testing.T) {
	ts := newTemplates(t, 3)
	addTemplate(t, ts, "old")
	addTemplate(t, ts, "young")
	if _, err := ts.reserve(templateMeta{Key: "not built", Built: time.Now()}); err != nil {
		t.Fatal(err)
	}
	old := ts.known[ts.index("old")]
	file := fmt.Sprintf("/proc/self/fd/%d", old.memory.Fd())
	memory, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	old.Built = time.Now().Add(-MaxTemplateAge - time.Second)
	ts.removeOld()
	if now, err := os.Stat(file); err == nil && os.SameFile(memory, now) {
		t.Error("the memory of the template is still there")
	}
	if entries, err := os.ReadDir(ts.dir); err != nil || len(entries) != 1 || len(ts.known) != 2 {
		t.Errorf("the directory has %v, %v; %d templates and places", entries, err, len(ts.known))
	}
	mustFind(t, ts, "young")
}

// While the files of a template are read, only starts that need it wait. It is read once.
func TestReadingTemplates(t *testing.T) {
	ts := newTemplates(t, 2)
	addTemplate(t, ts, "a")
	addTemplate(t, ts, "slow")
	again, log := restart(t, ts)

	found := make(chan *template)
	for range 4 {
		go func() {
			a, why := again.find(t.Context(), "a")
			if a == nil {
				t.Error(why)
			}
			found <- a
		}()
	}
	var first os.FileInfo
	for range 4 {
		a := <-found
		if a == nil {
			continue
		}
		info, err := a.memory.Stat()
		if first == nil {
			first = info
		}
		if err != nil || !os.SameFile(info, first) {
			t.Errorf("the starts have different memory: %v", err)
		}
		a.close()
	}

	// The read of this template blocks in the open of the file.
	pipe := filepath.Join(ts.dir, "slow", memoryFile)
	if err := errors.Join(os.Remove(pipe), unix.Mkfifo(pipe, 0o600)); err != nil {
		t.Fatal(err)
	}
	whys := make(chan string, 2)
	for range 2 {
		go func() {
			_, why := again.find(t.Context(), "slow")
			whys <- why
		}()
	}
	slow := again.known[again.index("slow")]
	waitUntil(t, "the template is being read", func() bool {
		free := slow.reading.TryLock()
		if free {
			slow.reading.Unlock()
		}
		return !free
	})
	mustFind(t, again, "a")
	again.removeOld()
	select {
	case why := <-whys:
		t.Errorf("a start did not wait for the template that is being read: %s", why)
	default:
	}
	writer, err := os.OpenFile(pipe, os.O_WRONLY, 0) // waits for the reader
	if err != nil {
		t.Fatal(err)
	}
	writer.Close()
	for range 2 {
		if why := <-whys; why == "" {
			t.Error("a damaged template is used")
		}
	}
	if strings.Count(log.String(), "is damaged; it is built again") != 1 {
		t.Errorf("log: %s", log)
	}
}

// Templates whose clones fail, and those of images that were removed, are removed.
func TestTemplatesAreRemoved(t *testing.T) {
	ts := newTemplates(t, 2)
	addTemplate(t, ts, "a")
	addTemplate(t, ts, "c")
	mustFind(t, ts, "a")
	addTemplate(t, ts, "a") // in place of itself
	mustFind(t, ts, "c")
	for range maxTemplateFailures {
		mustFind(t, ts, "c")
		ts.failed("c")
	}
	if found, _ := ts.find(t.Context(), "c"); found != nil {
		t.Error("a template whose clones fail is still there")
	}
	again, _ := restart(t, ts)
	if len(again.known) != 1 || again.known[0].Key != "a" {
		t.Errorf("after a restart there are %d templates", len(again.known))
	}
	addTemplate(t, again, "d")
	again.prune([]string{"image of a"})
	if found, _ := again.find(t.Context(), "d"); found != nil {
		t.Error("the template of an image that was removed is still there")
	}
	if !again.built("a").After(time.Now().Add(-time.Hour)) || !again.built("c").IsZero() {
		t.Errorf("a was built at %v, c at %v", again.built("a"), again.built("c"))
	}
}
