package e2e

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// randomness are programs that print lines, each with the name of a source of randomness and what it gave.
var randomness = map[string]string{
	"microsandbox/python": `import os, random, secrets, ssl, tempfile, time, uuid
print("urandom", os.urandom(16).hex())
print("random", random.random())
print("secrets", secrets.token_hex(16))
print("ssl", ssl.RAND_bytes(16).hex())
print("uuid4", uuid.uuid4())
print("tempfile", tempfile.mktemp())
print("hash", hash("x"))
for name in "boot_id", "uuid":
    print(name, open("/proc/sys/kernel/random/" + name).read().strip())
print("time", time.time())`,
	"microsandbox/node": `const crypto = require("crypto");
console.log("Math.random", Math.random());
console.log("randomBytes", crypto.randomBytes(16).toString("hex"));
console.log("randomUUID", crypto.randomUUID());
console.log("randomInt", crypto.randomInt(2 ** 47));
console.log("boot_id", require("fs").readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim());
console.log("time", Date.now() / 1000);`,
}

// TestClonesDiffer starts sandboxes from one template. Nothing random is equal in two of them, and all have the right time.
// MSB_E2E_CLONES=N sets how many sandboxes of each image there are.
func TestClonesDiffer(t *testing.T) {
	if hypervisorSettings["hypervisor"] == "kata" {
		t.Log("Kata's own driver has no templates")
		return
	}
	clones := 3
	if n, err := strconv.Atoi(os.Getenv("MSB_E2E_CLONES")); err == nil {
		clones = n
	}
	s, key := sharedServer(t)
	err := s.importImages("python", "node")
	if err == nil {
		err = s.waitForTemplates(2)
	}
	if err != nil {
		t.Fatal(err)
	}
	for image, program := range randomness {
		language := path.Base(image)
		seen := map[string]string{} // the sandbox that has printed a line
		var mu sync.Mutex
		var running sync.WaitGroup
		slots := make(chan struct{}, 2)
		for i := range clones {
			name := fmt.Sprintf("clone-%s-%d", language, i)
			running.Go(func() {
				slots <- struct{}{}
				defer func() { <-slots }()
				defer s.call(key, "sandbox.stop", params{"sandbox": name})
				if from := s.startFrom(t, key, name, image); from != "template" {
					t.Errorf("%s was started from %q, want template", name, from)
				}
				asked := time.Now()
				var r runResult
				s.mustCall(t, key, "sandbox.repl.run", params{"sandbox": name, "language": language, "code": program}, &r)
				answered := time.Now()
				mu.Lock()
				defer mu.Unlock()
				lines := strings.Split(strings.TrimSpace(r.text("stdout")), "\n")
				if len(lines) < 6 {
					t.Errorf("%s printed %q", name, r.text("stdout"))
				}
				for _, line := range lines {
					if seconds, ok := strings.CutPrefix(line, "time "); ok {
						// The guest corrects its clock to some milliseconds.
						const tolerance = 100 * time.Millisecond
						n, err := strconv.ParseFloat(seconds, 64)
						now := time.Unix(0, int64(n*1e9))
						if err != nil || now.Before(asked.Add(-tolerance)) || now.After(answered.Add(tolerance)) {
							t.Errorf("the time in %s is %s, %v, want one from %s to %s", name, now, err, asked, answered)
						}
						continue // two sandboxes that run at the same moment may print the same time
					}
					if other := seen[line]; other != "" {
						t.Errorf("%s and %s both have %s", name, other, line)
					}
					seen[line] = name
				}
			})
		}
		running.Wait()
	}
}

// waitForTemplateBuild waits until the server builds a template, and returns the directory of its microVM.
func (s *server) waitForTemplateBuild(t testing.TB) (dir string) {
	t.Helper()
	until(t, "the build of a template to begin", func() bool {
		found, err := filepath.Glob(filepath.Join(s.runDir, "vm", "template-*", "state.json"))
		if err != nil {
			t.Fatal(err)
		}
		if len(found) > 0 {
			dir = filepath.Dir(found[0])
		}
		return len(found) > 0
	})
	return dir
}

// hasTemplate reports whether sandboxes of the image start from a template. It starts one to find out.
func (s *server) hasTemplate(t testing.TB, key, image string) bool {
	const name = "probe"
	defer s.call(key, "sandbox.stop", params{"sandbox": name})
	return s.startFrom(t, key, name, image) == "template"
}

// startFrom starts a sandbox and returns how it was started.
func (s *server) startFrom(t testing.TB, key, name, image string) string {
	s.mustCall(t, key, "sandbox.start", params{"sandbox": name, "config": params{"image": image}}, nil)
	return s.startedFrom(t, key, name)
}

// startedFrom returns how a sandbox was started.
func (s *server) startedFrom(t testing.TB, key, name string) string {
	t.Helper()
	var info struct {
		StartedFrom struct{ Source string } `json:"started_from"`
	}
	s.mustCall(t, key, "sandbox.get", params{"sandbox": name}, &info)
	return info.StartedFrom.Source
}
