package sandbox

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestSignals(t *testing.T) {
	for text, want := range map[string]int{"INT": 2, "SIGINT": 2, "int": 2, "sigkill": 9, "TERM": 15, "WINCH": 28, "1": 1, "9": 9, "34": 34, "64": 64} {
		if got, err := ParseSignal(text); err != nil || got != want {
			t.Errorf("ParseSignal(%q) = %d, error %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "SIG", "0", "65", "-9", "+9", " 9", "9 ", "300", "KILLER", "SIGSIGINT", "\xff", strings.Repeat("9", 1<<20)} {
		if got, err := ParseSignal(text); got != 0 || !errdefs.IsInvalidArgument(err) || len(err.Error()) > 300 {
			t.Errorf("ParseSignal(%.20q) = %d, error %.300v; want InvalidArgument", text, got, err)
		}
	}
	for signal, want := range map[int]string{2: "INT", 9: "KILL", 15: "TERM", 34: "34", 64: "64", 0: "0", -1: "-1", 1 << 20: "1048576"} {
		if got := SignalName(signal); got != want {
			t.Errorf("SignalName(%d) = %q, want %q", signal, got, want)
		}
	}
	for signal := 1; signal <= maxSignal; signal++ {
		if got, err := ParseSignal(SignalName(signal)); err != nil || got != signal {
			t.Errorf("the name of signal %d is parsed as %d, error %v", signal, got, err)
		}
	}
}
