package mcp

import (
	"fmt"
	"strings"
	"unicode/utf8"

	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// maxCommand limits the command line of a process in a list, in bytes.
const maxCommand = 500

// listProcesses lists the processes, one in a line.
func listProcesses(c *call) (*sdk.CallToolResult, *rpc.Error) {
	res, rpcErr := callMethod[rpc.ProcessListResult](c, rpc.MethodProcessList, c.params(nil))
	if rpcErr != nil {
		return nil, rpcErr
	}
	lines := list{empty: "(no processes)", more: "stop processes that are no longer needed"}
	for _, p := range res.Processes {
		tag := ""
		if p.Tag != "" {
			tag = ", tag " + p.Tag
		}
		command := bounded.Text(strings.Join(append([]string{p.Command}, p.Args...), " "), maxCommand)
		lines.add(fmt.Sprintf("pid %d%s, %s, %d bytes of output: %s", p.PID, tag, stateText(p.Exit), p.OutputBytes, command))
	}
	return c.textResult(map[string]any{"processes": len(res.Processes)}, lines.String())
}

// stateText describes the state of a process. exit is nil if it runs.
func stateText(exit *rpc.ProcessExit) string {
	if exit == nil {
		return "running"
	}
	text := fmt.Sprintf("exit code %d", exit.ExitCode)
	if exit.TimedOut {
		text += ", time limit reached"
	}
	if exit.Reason != "" {
		text += ", " + exit.Reason
	}
	return text
}

// readOutput returns what a process has printed since an offset.
func readOutput(c *call) (*sdk.CallToolResult, *rpc.Error) {
	var numbers [3]int
	for i, n := range []number{maxOutput, position, waitFor} {
		var rpcErr *rpc.Error
		if numbers[i], rpcErr = c.take(n); rpcErr != nil {
			return nil, rpcErr
		}
	}
	length, from, wait := max(numbers[0], utf8.UTFMax), numbers[1], numbers[2]
	if wait > 0 {
		if _, rpcErr := c.invoke(rpc.MethodProcessWait, c.params(map[string]any{"timeout": wait}), nil); rpcErr != nil {
			return nil, rpcErr
		}
	}
	log, rpcErr := callMethod[rpc.ProcessLogsResult](c, rpc.MethodProcessLogs, c.params(map[string]any{"encoding": rpc.EncodingBase64}))
	if rpcErr != nil {
		return nil, rpcErr
	}
	var kept []byte
	for _, piece := range log.Output {
		kept = append(kept, piece.Base64...)
	}
	first, last := log.SkippedBytes, log.SkippedBytes+len(kept)
	begin := max(first, min(from, last))
	if from < 0 { // the newest output
		begin, from = max(first, last-length), 0
	}
	lost := max(0, begin-from)
	end := min(begin+length, last)
	// Characters that are cut now are complete in the next part.
	b, e := wholeRunes(kept[begin-first:end-first], begin > 0, end < last || log.Running)
	text := strings.ToValidUTF8(string(kept[begin-first:][b:e]), "\uFFFD")
	if end = begin + e; lost > 0 {
		text = fmt.Sprintf("[… %d earlier bytes are left out …]\n", lost) + text
	}
	note := "(" + stateText(log.Exit)
	switch {
	case end < last && e > 0:
		note += fmt.Sprintf("; more output follows at offset %d)", end)
	case log.Running:
		note += fmt.Sprintf("; newer output begins at offset %d)", end)
	default:
		note += ")"
	}
	meta := map[string]any{"next_offset": end, "running": log.Running}
	if log.Exit != nil {
		meta["exit"] = log.Exit
	}
	if text == "" {
		return c.textResult(meta, note)
	}
	return c.textResult(meta, text, note)
}

// stopSeconds is how long a process may take to end after SIGTERM, before it gets SIGKILL.
const stopSeconds = 10

// stopProcess ends a process and everything that it started.
func stopProcess(c *call) (*sdk.CallToolResult, *rpc.Error) {
	var state rpc.ProcessState
	for _, signal := range []string{"TERM", "KILL"} {
		_, rpcErr := c.invoke(rpc.MethodProcessSignal, c.params(map[string]any{"signal": signal, "all": true}), nil)
		if rpcErr != nil && rpcErr.Code != rpc.CodeConflict { // CodeConflict: it has ended
			return nil, rpcErr
		}
		if state, rpcErr = callMethod[rpc.ProcessState](c, rpc.MethodProcessWait, c.params(map[string]any{"timeout": stopSeconds})); rpcErr != nil {
			return nil, rpcErr
		}
		if !state.Running {
			break
		}
	}
	return c.textResult(state, "("+stateText(state.Exit)+")")
}
