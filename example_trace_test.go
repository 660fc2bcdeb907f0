// Examples of Trace.
package smtprelay_test

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"log/slog"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// Counting and timing: hooks get the context of the Send that they belong to, so a span can hang on it.
func ExampleTrace() {
	relay := smtptest.NewServer()
	defer relay.Close()
	cfg := relay.Config()
	cfg.Trace = &smtprelay.Trace{
		DialDone: func(_ context.Context, d smtprelay.DialInfo) {
			fmt.Println("connection", d.Conn, "ready:", d.Err == nil)
		},
		SendDone: func(_ context.Context, r smtprelay.Result, took time.Duration) {
			fmt.Println("sent to", r.Message.To, "error:", r.Err)
			_ = took // goes into a histogram
		},
	}
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	for _, to := range []string{"ann@example.org", "bob@example.org"} {
		_ = client.SendMail("shop@example.com", []string{to}, []byte("Subject: hello\r\n\r\nHello.\r\n"))
	}
	// Output:
	// connection 1 ready: true
	// sent to [ann@example.org] error: <nil>
	// sent to [bob@example.org] error: <nil>
}

// LogTrace logs what an operator should see and, at debug level, the dialogue: without secrets and bodies.
func ExampleLogTrace() {
	relay := smtptest.NewServer()
	defer relay.Close()
	var logged bytes.Buffer // really: os.Stderr
	cfg := relay.Config()
	cfg.Trace = smtprelay.LogTrace(slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug})))
	client, err := smtprelay.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(client.SendMail("shop@example.com", []string{"ann@example.org"}, []byte("Subject: hello\r\n\r\nHello.\r\n")))
	client.Close()

	for _, words := range []string{`line="AUTH PLAIN [redacted]"`, `line="RCPT TO:<ann@example.org>"`, `msg="smtp message accepted"`, "Hello."} {
		fmt.Println(words, strings.Contains(logged.String(), words))
	}
	// Output:
	// <nil>
	// line="AUTH PLAIN [redacted]" true
	// line="RCPT TO:<ann@example.org>" true
	// msg="smtp message accepted" true
	// Hello. false
}
