package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/client"
	"github.com/msbd/msbd/daemon/daemontest"
)

// newMSB returns a command that runs msb with a key.
func (s *server) newMSB(key string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(bin, "msb"), args...)
	cmd.Env = append(s.env(), "MSB_SERVER_URL=http://"+s.address, "MSB_API_KEY="+key, "TERM=xterm")
	return cmd
}

// TestCommandLine uses each command of msb for holders of a key with a microVM.
func TestCommandLine(t *testing.T) {
	s, key := sharedSandbox(t)
	dir := t.TempDir()
	run := func(stdin, script string) string {
		t.Helper()
		cmd := s.newMSB(key)
		cmd.Path, cmd.Args = "/bin/bash", []string{"bash", "-euo", "pipefail", "-c", script}
		cmd.Dir, cmd.Stdin = dir, strings.NewReader(stdin)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", script, err, out)
		}
		return string(out)
	}
	want := func(stdin, script, want string) {
		t.Helper()
		if got := run(stdin, script); got != want {
			t.Errorf("%s: got %q, want %q", script, got, want)
		}
	}
	want("", `msb sandbox run box 'x = 5; print("one"); x'`, "one\n5\n")
	want("for i in [x]:\n  print(i + 1)\n\nx\n", `msb repl box`, "6\n5\n")
	want("\xff\x00\r\n", `msb exec -i box -- cat`, "\xff\x00\r\n")
	want("", `msb exec -e A=b -w /usr -u nobody box -- sh -c 'echo $A $(pwd) $(id -un)'`, "b /usr nobody\n")
	want("", `msb exec box -- sh -c 'exit 3' || echo $?`, "3\n")
	want("echo $((6 * 7))\n", `msb shell box`, "42\n")

	const tree = `mkdir -p tree/sub/empty; cd tree; echo plain >plain; printf '#!/bin/sh\n' >sub/program; chmod 755 sub/program
ln -s sub/program link; ln -s /nowhere dangling; ln plain sub/hard; printf odd >' "odd" name'; printf bytes >"$(printf '\377\376')"; : >-rf; chmod 600 ./-rf
touch -d 2001-02-03T04:05:06.5Z plain; cd ..`
	const describe = `(cd %s && find . -mindepth 1 -printf '%%P %%M %%n %%l\n' | LC_ALL=C sort; stat -c %%.1Y plain)`
	original := run("", tree+"\n"+fmt.Sprintf(describe, "tree"))
	run("", `msb cp tree box:/tmp/copy; msb cp box:/tmp/copy back`)
	want("", fmt.Sprintf(describe, "back"), original)
	want("", `msb exec box -- stat -c '%h %y' /tmp/copy/plain`, "2 2001-02-03 04:05:06.500000000 +0000\n")
	want("hello", `msb cp - box:/tmp/streamed; msb cp box:/tmp/streamed -`, "hello")

	run("", `msb exec -d --tag web box -- python3 -u -m http.server 8000`)
	if got := run("", `msb process ls box`); !strings.Contains(got, "web") || !strings.Contains(got, "running") {
		t.Errorf("processes: %s", got)
	}
	port := freePort(t)
	forward := s.newMSB(key, "forward", "box", fmt.Sprintf("%d:8000", port))
	if err := forward.Start(); err != nil {
		t.Fatal(err)
	}
	defer forward.Process.Kill()
	until(t, "an answer through the port", func() bool {
		res, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/", port))
		if err != nil {
			return false
		}
		defer res.Body.Close()
		body, _ := io.ReadAll(res.Body)
		return strings.Contains(string(body), "Directory listing")
	})
	if err := forward.Process.Signal(os.Interrupt); err != nil {
		t.Error(err)
	}
	if err := forward.Wait(); err != nil {
		t.Errorf("forward after Ctrl-C: %v", err)
	}
	if got := run("", `msb process kill box web; msb process logs -f box web 2>&1`); !strings.Contains(got, "GET / HTTP/1.1") {
		t.Errorf("logs: %s", got)
	}
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// TestTerminal runs less in a terminal of a microVM, resizes it, and kills the server under it.
func TestTerminal(t *testing.T) {
	s, key := sharedSandbox(t)
	less := daemontest.StartSession(t, s.newMSB(key, "exec", "-it", "box", "--", "sh", "-c", "seq 1000 | less"))
	less.Until("\x1b[?1049h") // the alternate screen
	less.Until("29\r\n:")     // of the 30 rows, the last is for the prompt
	less.Resize(90, 40)
	until(t, "the new size of the terminal", func() bool {
		sizes := s.command(t, key, "box", "sh", "-c", "for t in /dev/pts/[0-9]*; do stty -F $t size; done").text("stdout")
		return strings.Contains(sizes, "40 90")
	})
	less.Type("r") // if SIGWINCH comes just before less waits for a key, less handles it only after the key
	less.Until("39\r\n:")
	less.Type("G")
	less.Until("1000\r\n")
	less.Type("q")
	less.WantEnd(0)

	less = daemontest.StartSession(t, s.newMSB(key, "exec", "-it", "box", "--", "sh", "-c", "seq 1000 | less"))
	less.Until("29\r\n:")
	s.kill()
	less.Until("\x1b[?1049l") // msb leaves the alternate screen, because less cannot
	less.Until("msb: ")
	less.WantEnd(125)
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	until(t, "the end of less", func() bool { return !s.runsIn(t, key, "less") })
}

// TestGoClient uses each ability of the Go client with a microVM. The tests of the client itself have more details.
func TestGoClient(t *testing.T) {
	s, key := sharedSandbox(t)
	ctx := t.Context()
	box := (&client.Client{ServerURL: "http://" + s.address, Key: client.NewKey(key)}).Sandbox("", "box")

	var out strings.Builder
	png := ""
	execution, err := box.Run(ctx, client.Code{
		Language: "python", Source: "class Image:\n  def _repr_png_(self): return b'\\x89PNG'\nprint('one')\ndisplay(Image())\n6 * 7", Stdout: &out,
		OnResult: func(r client.Result) error { png += string(r.PNG()); return nil },
	})
	if err != nil || out.String() != "one\n" || png != "\x89PNG" || execution.Text() != "42" || string(execution.PNG()) != "\x89PNG" || execution.Err() != nil {
		t.Errorf("run: %q %q %+v %v", out.String(), png, execution, err)
	}
	if execution, err = box.Run(ctx, client.Code{Language: "python", Source: "1 / 0"}); err != nil || execution.Err() == nil || execution.Exception.Name != "ZeroDivisionError" {
		t.Errorf("exception: %+v, %v", execution, err)
	}
	execution, err = box.Run(ctx, client.Code{Language: "python", Source: "import time; print('begun', flush=True); time.sleep(99)", Timeout: 3 * time.Second})
	if !errors.Is(err, client.ErrRunTimeout) || execution == nil || execution.Stdout != "begun\n" {
		t.Errorf("time limit: %+v, %v", execution, err)
	}
	if _, err := box.CreateContext(ctx, client.ContextOptions{Language: "python", Name: "apart", Dir: "/tmp"}); err != nil {
		t.Error(err)
	}
	if execution, err = box.Run(ctx, client.Code{Context: "apart", Source: "import os; os.getcwd()"}); err != nil || execution.Text() != "'/tmp'" {
		t.Errorf("context: %+v, %v", execution, err)
	}
	if err := box.RemoveContext(ctx, "apart"); err != nil {
		t.Error(err)
	}

	input := bytes.Repeat([]byte{0, 0xff, '\n'}, 1<<18)
	var output bytes.Buffer
	p, err := box.StartProcess(ctx, client.Command{Name: "cat", Attachment: client.Attachment{Stdin: bytes.NewReader(input), Stdout: &output}})
	if err != nil {
		t.Fatal(err)
	}
	if exit, err := p.Wait(); err != nil || exit.ExitCode != 0 || !bytes.Equal(output.Bytes(), input) {
		t.Errorf("cat: %+v, %v, %d bytes", exit, err, output.Len())
	}

	watching, cancel := context.WithCancel(ctx)
	files := box.Files()
	err = files.Watch(watching, "/tmp", false, func() error {
		_, err := files.Write(ctx, "/tmp/from-go", strings.NewReader("hello"), client.WriteOptions{})
		return err
	}, func(change rpc.FSChange) error {
		if change.Path == "from-go" {
			cancel()
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("watch: %v", err)
	}
	if data, err := files.Read(ctx, "/tmp/from-go"); err != nil || string(data) != "hello" {
		t.Errorf("read: %q, %v", data, err)
	}
	if list, err := files.List(ctx, "/tmp", 1); err != nil || len(list) == 0 {
		t.Errorf("list: %+v, %v", list, err)
	}
}
