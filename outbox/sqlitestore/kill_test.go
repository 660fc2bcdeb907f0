//go:build unix

// Here belongs what needs a worker that is killed, or watched. It is this test's binary again, as a process of its own.
package sqlitestore_test

import (
	"bufio"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/smtprelay/smtprelay/outbox"
	"github.com/smtprelay/smtprelay/outbox/sqlitestore"
	"github.com/smtprelay/smtprelay/outbox/storetest"
)

func TestMain(m *testing.M) {
	if storetest.Child(open) {
		return
	}
	os.Exit(m.Run())
}

func open(dir string) (outbox.Store, error) { return sqlitestore.Open(dir) }

func TestKilledWorkerLosesNothingAndSendsNothingTwice(t *testing.T) {
	storetest.Kills(t, storetest.Engine{Open: open, Place: func(t *testing.T) string { return t.TempDir() },
		Kills: 30, Most: map[string]int{"at end": 8, "early": 16}})
}

// What Enqueue has said is durable was synced before it said so: strace sees both.
func TestEnqueueReturnsBehindAnFsync(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Log("strace is not installed: nothing was looked at")
		return
	}
	cmd := storetest.Process("enqueue", t.TempDir(), "127.0.0.1:25", strace, "-f", "-e", "trace=fsync,fdatasync,write", "-o", "/dev/stdout")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	sync, said := regexp.MustCompile(`(fsync|fdatasync)(\(| resumed).*= 0`), regexp.MustCompile(`write\(1, "durable `)
	syncs, durable := 0, 0
	lines := bufio.NewScanner(strings.NewReader(string(out)))
	for lines.Scan() {
		switch line := lines.Text(); {
		case sync.MatchString(line):
			syncs++
		case said.MatchString(line):
			if durable++; syncs == 0 {
				t.Errorf("Enqueue %d has returned, and nothing was synced", durable)
			}
			syncs = 0
		}
	}
	if durable != 10 {
		t.Errorf("%d of 10 were seen", durable)
	}
}
