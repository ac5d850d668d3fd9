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

// WriteResponse writes an rpc.Response with a result, or with an error if failed is not nil. The id stays byte for
// byte as it is; nil is null. The error is w's.
func WriteResponse(w io.Writer, result jsontext.Value, failed *rpc.Error, id jsontext.Value) error {
	write := func(what string, value jsontext.Value) error {
		_, err := io.WriteString(w, what)
		if err == nil {
			_, err = w.Write(value)
		}
		return err
	}
	var err error
	if failed == nil {
		err = write(`{"jsonrpc":"2.0","result":`, result)
	} else if _, err = io.WriteString(w, `{"jsonrpc":"2.0","error":`); err == nil {
		// What is in a message may be what a client sent.
		err = json.MarshalWrite(w, failed, jsontext.AllowInvalidUTF8(true))
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

// SetHeaders adds what goes with an HTTP response that carries only an error.
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
