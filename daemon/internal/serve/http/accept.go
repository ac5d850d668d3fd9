package http

import (
	"mime"
	"net/http"
	"strconv"
	"strings"
)

// Accepted returns the media types that the Accept header of a request names, without parameters and in lower case. It leaves
// out those with the quality 0, which the client refuses, and what is not valid.
func Accepted(h http.Header) (mediaTypes []string) {
	for item := range strings.SplitSeq(strings.Join(h["Accept"], ","), ",") {
		mediaType, params, err := mime.ParseMediaType(item)
		if err != nil {
			continue
		}
		if q, err := strconv.ParseFloat(params["q"], 64); err != nil || q > 0 {
			mediaTypes = append(mediaTypes, mediaType)
		}
	}
	return mediaTypes
}
