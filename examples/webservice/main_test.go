package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

func TestSignupAnswersByTheOutcomeOfTheMail(t *testing.T) {
	for _, test := range []struct {
		name   string
		email  string
		faults []smtptest.Fault
		want   int
		mails  int
	}{
		{"all is well", "ann@example.org", nil, http.StatusOK, 1},
		{"name and address", "Ann <ann@example.org>", nil, http.StatusOK, 1},
		{"no address", "ann", nil, http.StatusBadRequest, 0},
		{"no mailbox", "ann@example.org", []smtptest.Fault{{At: smtptest.Rcpt, Reply: "550 5.1.1 no such user"}}, http.StatusUnprocessableEntity, 0},
		{"greylisted", "ann@example.org", []smtptest.Fault{{At: smtptest.Rcpt, Reply: "451 4.7.1 later"}}, http.StatusServiceUnavailable, 0},
		{"lost before the dot", "ann@example.org", []smtptest.Fault{{At: smtptest.Data, Drop: true}}, http.StatusOK, 1},
		{"lost after the dot", "ann@example.org", []smtptest.Fault{{At: smtptest.Accepted, Drop: true}}, http.StatusAccepted, 1},
		{"refused for good", "ann@example.org", []smtptest.Fault{{At: smtptest.FinalDot, Reply: "554 5.7.1 no"}}, http.StatusInternalServerError, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			relay := smtptest.NewServer()
			defer relay.Close()
			for _, f := range test.faults {
				relay.Fault(f)
			}
			client, err := smtprelay.New(relay.Config())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()

			form := strings.NewReader(url.Values{"email": {test.email}}.Encode())
			r := httptest.NewRequestWithContext(t.Context(), "POST", "/signup", form)
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			w := httptest.NewRecorder()
			(&signup{client: client, from: "shop@example.com"}).ServeHTTP(w, r)
			if w.Code != test.want {
				t.Errorf("got %d %s, want %d", w.Code, w.Body, test.want)
			}
			if n := relay.Stats().Accepted; n != test.mails {
				t.Errorf("the relay has %d mails, want %d", n, test.mails)
			}
		})
	}
}

// A request in progress when the signal arrives gets its answer, and the relay its QUIT.
func TestShutdownFinishesRequestsAndThenTheClient(t *testing.T) {
	relay := smtptest.NewServer()
	defer relay.Close()
	stall := relay.Fault(smtptest.Fault{At: smtptest.FinalDot, Stall: true})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, signal := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- serve(ctx, l, relay.Config(), "shop@example.com") }() // ends by signal

	type answer struct {
		code int
		err  error
	}
	answers := make(chan answer, 1)
	go func() {
		r, err := http.PostForm("http://"+l.Addr().String()+"/signup", url.Values{"email": {"ann@example.org"}})
		if err != nil {
			answers <- answer{0, err}
			return
		}
		defer r.Body.Close()
		_, err = io.Copy(io.Discard, r.Body)
		answers <- answer{r.StatusCode, err}
	}()
	if err := stall.Wait(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	signal() // the relay has the whole message and has not replied
	stall.Remove()
	if a := <-answers; a.err != nil || a.code != http.StatusOK {
		t.Errorf("the request in progress: %d, %v", a.code, a.err)
	}
	if err := <-served; err != nil {
		t.Errorf("serve: %v", err)
	}
	for _, c := range relay.Conns() {
		if c.Commands["QUIT"] != 1 {
			t.Errorf("connection %d had %d QUITs, want 1", c.Conn, c.Commands["QUIT"])
		}
	}
}
