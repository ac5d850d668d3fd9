package mcp

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// Models start processes, poll their output, send them input and stop them.
func TestProcesses(t *testing.T) {
	s := newSite(t)
	call := func(tool, arguments string) []string {
		t.Helper()
		return contents(s.callTool(t, tool, `{"sandbox":"a"`+arguments+`}`))
	}
	want := func(tool, arguments string, want ...string) {
		t.Helper()
		if got := call(tool, arguments); !slices.Equal(got, want) {
			t.Errorf("%s %s: got %.300q, want %.300q", tool, arguments, got, want)
		}
	}
	want("sandbox_list_processes", "", "(no processes)")
	want("sandbox_start_process", `,"command":"cat","stdin":"one\n","open_stdin":true,"tag":"worker"`, `{"pid":101,"tag":"worker"}`)
	want("sandbox_get_process_output", `,"tag":"worker"`, "one\n", "(running; newer output begins at offset 4)")
	want("sandbox_get_process_output", `,"pid":101,"offset":4`, "(running; newer output begins at offset 4)")
	want("sandbox_send_process_input", `,"pid":101,"data":"twé"`, "Done")
	want("sandbox_get_process_output", `,"pid":101,"offset":4`, "twé", "(running; newer output begins at offset 8)")
	want("sandbox_get_process_output", `,"pid":101,"offset":0,"max_output_bytes":5`, "one\nt", "(running; more output follows at offset 5)")
	want("sandbox_get_process_output", `,"pid":101,"max_output_bytes":4`, "[… 4 earlier bytes are left out …]\ntwé", "(running; newer output begins at offset 8)")
	want("sandbox_get_process_output", `,"pid":101,"offset":3,"max_output_bytes":4`, "\ntw", "(running; more output follows at offset 6)")
	want("sandbox_list_processes", "", "pid 101, tag worker, running, 8 bytes of output: cat")
	want("sandbox_send_process_input", `,"pid":101,"data":"\n","close":true`, "Done")
	want("sandbox_get_process_output", `,"pid":101,"offset":6`, "é\n", "(exit code 0)")
	want("sandbox_get_process_output", `,"pid":101,"offset":99`, "(exit code 0)")
	want("sandbox_send_process_input", `,"pid":101,"data":"x"`, "process 101 has ended")
	want("sandbox_stop_process", `,"pid":101`, "(exit code 0)")

	want("sandbox_start_process", `,"command":"sleep","timeout":0.001`, `{"pid":102}`)
	want("sandbox_get_process_output", `,"pid":102,"wait":300`, "(exit code 143, time limit reached)")
	want("sandbox_start_process", `,"command":"sleep"`, `{"pid":103}`)
	want("sandbox_stop_process", `,"pid":103`, "(exit code 143)")
	if !s.sandboxes.All {
		t.Error("the signal was not for everything that the process started")
	}
	want("sandbox_stop_process", `,"pid":9`, "there is no such process")
	want("sandbox_get_process_output", `,"pid":101,"wait":301`, "wait must be an integer from 0 to 300")
	want("sandbox_get_process_output", ``, "name the process by either pid or tag")
	want("sandbox_start_process", `,"command":"nope"`, `run "nope": command not found`)
}

// What processes are called is limited in a list.
func TestListProcessesIsLimited(t *testing.T) {
	s := newSite(t)
	for range 300 {
		req := sandbox.ProcessRequest{Tag: "a\nb", Command: sandbox.Command{Program: "true", Args: []string{"x\n\x1b", strings.Repeat("y", 10_000)}}}
		if _, err := s.sandboxes.StartProcess(t.Context(), sandboxA, req); err != nil {
			t.Fatal(err)
		}
	}
	got := contents(s.callTool(t, "sandbox_list_processes", `{"sandbox":"a"}`))[0]
	lines := strings.Split(got, "\n")
	if first := `pid 101, tag a\nb, exit code 0, 0 bytes of output: true x\n\x1b yyy`; !strings.HasPrefix(lines[0], first) {
		t.Errorf("%.100q, want %q", lines[0], first)
	}
	if last := fmt.Sprintf("(%d more; stop processes that are no longer needed)", 301-len(lines)); len(got) > maxList+100 || lines[len(lines)-1] != last {
		t.Errorf("%d bytes; the last line is %q, want %q", len(got), lines[len(lines)-1], last)
	}
}

// A process that does not end after SIGTERM gets SIGKILL.
func TestStopProcessThatIgnoresSIGTERM(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		s.sandboxes.Stubborn = true
		s.callTool(t, "sandbox_start_process", `{"sandbox":"a","command":"sleep"}`)
		if got := contents(s.callTool(t, "sandbox_stop_process", `{"sandbox":"a","pid":101}`)); !slices.Equal(got, []string{"(exit code 137)"}) {
			t.Errorf("%q", got)
		}
	})
}
