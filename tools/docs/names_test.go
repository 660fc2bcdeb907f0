// Tests the names in the sentences of the pages for users: fields, methods and functions exist, and URLs are valid.
package docs

import (
	"fmt"
	"go/types"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/tools/go/packages"

	"github.com/smtprelay/smtprelay"
)

// forUsers returns the pages that users read: the README and those in docs.
func forUsers(t *testing.T) map[string]string {
	t.Helper()
	pages := read(t).pages
	maps.DeleteFunc(pages, func(name, _ string) bool { return name != "README.md" && !strings.HasPrefix(name, "docs/") })
	return pages
}

// dotted is a name in a sentence, with what follows it: "Limits.Rate", "Stats().Unknown", "smtptest.New(t)".
var dotted = regexp.MustCompile(`^(?:Config\.)?(\w+)(?:\(\))?\.([A-Z]\w*)(?:$|[^\w.])`)

func TestNamesInPagesExist(t *testing.T) {
	loaded, err := packages.Load(&packages.Config{Mode: packages.NeedName | packages.NeedTypes | packages.NeedImports | packages.NeedDeps | packages.NeedExportFile},
		module, module+"/preset", module+"/smtp", module+"/smtpapi", module+"/smtptest", module+"/outbox",
		module+"/adapters/relaygomail", module+"/adapters/relaymail")
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]*types.Package{}
	for _, p := range loaded {
		known[p.Name] = p.Types
	}
	number := 0
	for page, text := range forUsers(t) {
		for _, m := range code.FindAllStringSubmatch(prose(text), -1) {
			name := dotted.FindStringSubmatch(m[1])
			if name == nil || strings.Contains(m[1], "…") || page == troubleshooting && strings.Contains(m[1], ": ") {
				continue
			}
			if exists, ours := lookUp(known, name[1], name[2]); ours {
				number++
				if !exists {
					t.Errorf("%s: %s does not exist", page, m[1])
				}
			}
		}
	}
	if number < 100 {
		t.Errorf("found only %d names", number)
	}
	for span, want := range map[string][2]bool{ // cases that must be told apart, so that the test can fail
		"Limits.MaxConns": {true, true}, "Limits.MaxCons": {false, true}, "Stats().Unknown": {true, true}, "Config.Retry.On4xx": {true, true},
		"smtptest.New(t)": {true, true}, "smtprelay.Nothing": {false, true}, "client.Send(ctx, m)": {true, true}, "Dialer.SSL": {false, false},
	} {
		name := dotted.FindStringSubmatch(span)
		if exists, ours := lookUp(known, name[1], name[2]); exists != want[0] || ours != want[1] {
			t.Errorf("%s: got %v, %v", span, exists, ours)
		}
	}
}

// lookUp reports whether what, a package or a type of the library, has something called name, and whether what is ours.
func lookUp(known map[string]*types.Package, what, name string) (exists, ours bool) {
	if p := known[what]; p != nil {
		return p.Scope().Lookup(name) != nil, true
	}
	switch what { // variables of the pages
	case "client":
		what = "Client"
	case "relay":
		what = "Server"
	}
	for _, pkg := range []string{"smtprelay", "smtptest", "smtpapi"} {
		if object, ok := known[pkg].Scope().Lookup(what).(*types.TypeName); ok && object.Exported() {
			field, _, _ := types.LookupFieldOrMethod(object.Type(), true, known[pkg], name)
			if ours = true; field != nil {
				return true, true
			}
		}
	}
	return false, ours
}

// A URL of a page may have words in capitals as placeholders.
func TestURLsInPagesAreValid(t *testing.T) {
	inPage := regexp.MustCompile("[`'\"]((?:smtps?|smtp\\+insecure|sendgrid|ses|mailgun|postmark|mailjet|brevo|resend|sparkpost|mailtrap|gmail|microsoft365|mailpit)://[^`'\" ]*|\\?[a-z_]+=[^`'\" ]+)[`'\"]")
	var seen []string
	for page, text := range forUsers(t) {
		for _, m := range inPage.FindAllStringSubmatch(text, -1) {
			url := m[1]
			if strings.HasSuffix(url, "://") || strings.Contains(url, "…") || strings.Contains(url, "user:key@host") || strings.Contains(url, "ca=") {
				continue // a scheme alone, or a pattern
			}
			if url[0] == '?' {
				url = "smtp://mail.example.com" + url
			}
			seen = append(seen, url)
			if _, err := smtprelay.ParseURL(url); err != nil {
				t.Errorf("%s: %s: %v", page, m[1], err)
			}
		}
	}
	if slices.Sort(seen); len(slices.Compact(seen)) < 20 {
		t.Error(fmt.Sprint("found only these: ", seen))
	}
}

// Each row of the table in docs/limits.md names a field of Limits, and the parameter of a URL that sets it.
func TestTableOfLimitsHasEachFieldAndItsParameter(t *testing.T) {
	rows := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `(\\w+)` \\| [^|]+ \\| (?:`(\\w+)` )?\\|").FindAllStringSubmatch(forUsers(t)["docs/limits.md"], -1) {
		rows[m[1]] = m[2]
	}
	limits := reflect.TypeFor[smtprelay.Limits]()
	for i := range limits.NumField() {
		field := limits.Field(i)
		if !field.IsExported() {
			continue
		}
		param, ok := rows[field.Name]
		delete(rows, field.Name)
		switch {
		case !ok:
			t.Errorf("%s has no row", field.Name)
		case param != "":
			value := "7"
			if field.Type == reflect.TypeFor[time.Duration]() {
				value = "7s"
			}
			cfg, err := smtprelay.ParseURL("smtp://mail.example.com?" + param + "=" + value)
			if err != nil || reflect.ValueOf(cfg.Limits).Field(i).IsZero() {
				t.Errorf("%s does not set %s: %v", param, field.Name, err)
			}
		}
	}
	for name := range rows {
		t.Errorf("Limits has no field %s", name)
	}
}

func TestTableOfTLSModesHasEachModeAndItsURL(t *testing.T) {
	modes := map[string]smtprelay.TLSMode{}
	for m := smtprelay.TLSByPort; !strings.HasPrefix(m.String(), "TLSMode("); m++ {
		modes[m.String()] = m
	}
	for _, m := range regexp.MustCompile("(?m)^\\| `TLS(\\w+)`[^|]* \\| `([^`]+)` \\|").FindAllStringSubmatch(forUsers(t)["docs/security.md"], -1) {
		name, url := strings.ToLower(m[1]), m[2]
		if name == "byport" {
			name = "by port"
		}
		mode, ok := modes[name]
		delete(modes, name)
		if strings.HasSuffix(url, "://") {
			url += "mail.example.com"
		} else {
			url = "smtp://mail.example.com?" + url
		}
		if cfg, err := smtprelay.ParseURL(url); !ok || err != nil || cfg.TLS != mode {
			t.Errorf("%s: %s is %v, %v", m[1], m[2], cfg.TLS, err)
		}
	}
	for name := range modes {
		t.Errorf("docs/security.md has no row for the mode %s", name)
	}
}
