package e2e

import (
	"strings"
	"testing"
)

// TestOverload lets the programs in a small sandbox use up its memory and its processes. The portal, which runs beside
// them, goes on, what ran out is named, and a command can be run afterwards. The test also checks what the guest's agent
// prepares for programs, because that needs no sandbox of its own.
func TestOverload(t *testing.T) {
	s, key := sharedServer(t)
	const name = "overload"
	t.Cleanup(func() { s.call(key, "sandbox.stop", params{"sandbox": name}) })
	s.mustCall(t, key, "sandbox.start", params{"sandbox": name, "config": params{"memory": 128}}, nil)
	id := s.sandboxID(name)
	const why = "killed: out of memory (the sandbox has 128 MiB)"
	// works checks that the sandbox is the same as at the beginning, and runs a command. A command may be refused until
	// the killed processes are gone.
	works := func(t *testing.T) {
		t.Helper()
		until(t, "a command", func() bool {
			a, err := s.call(key, "sandbox.command.run", params{"sandbox": name, "command": "echo", "args": []string{"works"}, "timeout": 60})
			if err != nil || a.Error != nil && !strings.Contains(a.Error.Message, "cannot start another process") {
				t.Fatalf("command after the overload: %v, %v", a, err)
			}
			return a.Error == nil && strings.Contains(string(a.Result), "works")
		})
		if got := s.sandboxID(name); got != id {
			t.Errorf("the sandbox has the id %s, want %s", got, id)
		}
	}

	t.Run("environment", func(t *testing.T) {
		for script, want := range map[string]string{
			// The portal is protected from its programs.
			"cat /proc/1/oom_score_adj /proc/self/oom_score_adj; cut -d: -f3 /proc/1/cgroup /proc/self/cgroup | sed 's,/[0-9]*/all$,/N/all,'": "-999\n0\n/../portal\n/processes/N/all\n",
			"getent hosts localhost; getent hosts sandbox; cat /etc/hostname":                                                                 "::1             localhost ip6-localhost ip6-loopback\n127.0.1.1       sandbox\nsandbox\n",
			"TZ=America/New_York date -d @1700000000 +%H:%M%z":                                                                                "17:13-0500\n",
			"python3 -c 'import zoneinfo; print(zoneinfo.ZoneInfo(\"Asia/Kolkata\"))'":                                                        "Asia/Kolkata\n",
			"mknod /tmp/console c 5 1 && (echo forged >/tmp/console) 2>&1 | grep -o 'Operation not permitted'":                                "Operation not permitted\n",
		} {
			if r := s.command(t, key, name, "sh", "-c", script); r.text("stdout") != want {
				t.Errorf("%s: got %+v, want the output %q", script, r, want)
			}
		}
	})
	t.Run("memory in a session", func(t *testing.T) {
		r := s.python(t, key, name, "x = []\nwhile True: x.append(bytearray(8 << 20))")
		if want := "the python process was " + why + "; its state is lost\n"; r.Status != "error" || r.text("stderr") != want {
			t.Errorf("got %+v, want %q on stderr", r, want)
		}
		works(t)
	})
	t.Run("memory in a command", func(t *testing.T) {
		script := "python3 -c 'x = []\nwhile True: x.append(bytearray(8 << 20))'; exit $?"
		if r := s.command(t, key, name, "sh", "-c", script); r.ExitCode != 137 || !strings.HasSuffix(r.text("stderr"), why+"\n") {
			t.Errorf("got %+v, want exit code 137 and %q at the end of stderr", r, why)
		}
		if r := s.command(t, key, name, "sh", "-c", "kill -9 $$"); r.ExitCode != 137 || r.text("stderr") != "" {
			t.Errorf("a command that kills itself: got %+v, want exit code 137 and nothing on stderr", r)
		}
		works(t)
	})
	t.Run("many processes that use memory", func(t *testing.T) {
		script := "for i in $(seq 80); do (head -c 3000000 /dev/zero; sleep 60) | tail >/dev/null & done; wait"
		a, err := s.call(key, "sandbox.command.run", params{"sandbox": name, "command": "sh", "args": []string{"-c", script}, "timeout": 6})
		if err != nil || a.Error != nil && a.Error.Code != -32007 {
			t.Errorf("got %v, %v; want a result, or the error that the time limit was reached", a, err)
		}
		works(t)
	})
	t.Run("fork bomb", func(t *testing.T) {
		a, err := s.call(key, "sandbox.command.run", params{"sandbox": name, "command": "sh", "args": []string{"-c", "f() { f | f & }; f; sleep 60"}, "timeout": 5})
		if err != nil || a.Error != nil && a.Error.Code != -32007 {
			t.Errorf("got %v, %v; want a result, or the error that the time limit was reached", a, err)
		}
		works(t)
	})
}
