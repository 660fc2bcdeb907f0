// What the metrics cost for each Send.
package promsmtprelay_test

import (
	"testing"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/promsmtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

func BenchmarkSend(b *testing.B) {
	for _, with := range []bool{false, true} {
		b.Run(map[bool]string{false: "without", true: "with"}[with], func(b *testing.B) {
			relay := smtptest.NewUnstartedServer()
			relay.MaxMessages, relay.DropBodies = -1, true
			relay.Start()
			defer relay.Close()
			cfg := relay.Config()
			cfg.Limits.MaxMessagesPerConn = smtprelay.NoLimit
			if with {
				cfg.Trace = promsmtprelay.New().Trace()
			}
			client, err := smtprelay.New(cfg)
			if err != nil {
				b.Fatal(err)
			}
			defer client.Close()
			body := []byte("Subject: x\r\n\r\nx\r\n")
			b.ReportAllocs()
			for b.Loop() {
				if err := client.SendMail("a@example.com", []string{"b@example.com"}, body); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
