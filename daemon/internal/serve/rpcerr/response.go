package rpcerr

import (
	"io"
	"net/http"
	"strconv"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
)

var null = jsontext.Value("null")

// WriteResponse writes an rpc.Response to w, with rpcErr if that is not nil, else with result. It writes id byte for
// byte, or null if id is nil. It returns the error of w.
func WriteResponse(w io.Writer, result jsontext.Value, rpcErr *rpc.Error, id jsontext.Value) error {
	write := func(prefix string, value jsontext.Value) error {
		_, err := io.WriteString(w, prefix)
		if err == nil {
			_, err = w.Write(value)
		}
		return err
	}
	var err error
	if rpcErr == nil {
		err = write(`{"jsonrpc":"2.0","result":`, result)
	} else if _, err = io.WriteString(w, `{"jsonrpc":"2.0","error":`); err == nil {
		// A message may quote what a client sent, which need not be valid UTF-8.
		err = json.MarshalWrite(w, rpcErr, jsontext.AllowInvalidUTF8(true))
	}
	if err != nil {
		return err
	}
	if id == nil {
		id = null
	}
	if err := write(`,"id":`, id); err != nil {
		return err
	}
	_, err = io.WriteString(w, "}")
	return err
}

// SetHeaders adds the headers of an HTTP response that carries only the error e: WWW-Authenticate to a 401,
// Retry-After to a 429 or 503.
func SetHeaders(h http.Header, status int, e *rpc.Error) {
	switch status {
	case http.StatusUnauthorized:
		h["Www-Authenticate"] = []string{"Bearer"}
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		if e.Data != nil && e.Data.RetryAfter > 0 {
			h["Retry-After"] = []string{strconv.Itoa(e.Data.RetryAfter)}
		}
	}
}
