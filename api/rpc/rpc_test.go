package rpc

import (
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/google/go-cmp/cmp"
)

// A line of output has either text or base64, also if it is empty.
func TestLine(t *testing.T) {
	for text, line := range map[string]Line{
		`{"stream":"stdout","text":"a\n"}`:      {Stream: "stdout", Text: "a\n"},
		`{"stream":"stderr","text":""}`:         {Stream: "stderr"},
		`{"stream":"terminal","base64":"AP8="}`: {Stream: "terminal", Base64: []byte{0, 0xff}},
		`{"stream":"stdout","base64":""}`:       {Stream: "stdout", Base64: []byte{}},
	} {
		if got, err := json.Marshal(line); string(got) != text || err != nil {
			t.Errorf("%+v became %s, %v, want %s", line, got, err, text)
		}
		var got Line
		if err := json.Unmarshal([]byte(text), &got); err != nil || !cmp.Equal(got, line) {
			t.Errorf("%s became %+v, %v, want %+v", text, got, err, line)
		}
	}
}

// The output of a run is a part of the data of an error only if there is any.
func TestErrorData(t *testing.T) {
	for text, data := range map[string]ErrorData{
		`{"retry_after":1}`: {RetryAfter: 1},
		`{"output":[],"truncated":false,"timed_out":true}`: {PartialOutput: &PartialOutput{Output: []Line{}, TimedOut: true}},
	} {
		if got, err := json.Marshal(data); string(got) != text || err != nil {
			t.Errorf("%+v became %s, %v, want %s", data, got, err, text)
		}
		var got ErrorData
		if err := json.Unmarshal([]byte(text), &got); err != nil || !cmp.Equal(got, data) {
			t.Errorf("%s became %+v, %v, want %+v", text, got, err, data)
		}
	}
}
