package conn

// Tests of the steps that open a connection.

import (
	"crypto/tls"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

func TestHandshakeWithoutLimitOutlastsTheLimitOfSTARTTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer ours.Close()
		go io.Copy(io.Discard, theirs) // ends with theirs
		time.AfterFunc(time.Hour, func() { _ = theirs.Close() })
		raw := newProgressConn(ours, 0, 0)
		began := time.Now()
		_ = raw.SetReadDeadline(began.Add(30 * time.Second))
		d := &dialogue{c: &Conn{raw: raw}, o: &Options{TLS: &tls.Config{ServerName: "relay.example"}}}
		e := d.startTLS(t.Context())
		if took := time.Since(began); e == nil || took != time.Hour {
			t.Errorf("%v after %v, want an error after the hour that the relay was silent", e, took)
		}
	})
}
