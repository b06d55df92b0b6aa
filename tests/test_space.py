# Copyright 2026 The ERW-HF authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The demo, served for real and asked through its API."""

import importlib.util

import pytest
from helpers import REPOSITORY


@pytest.fixture(scope="module")
def client():
    from gradio_client import Client

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        spec = importlib.util.spec_from_file_location("app", REPOSITORY / "spaces" / "erw" / "app.py")
        app = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(app)
        _, url, _ = app.demo.queue().launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
        yield Client(url, verbose=False)
        app.demo.close()


def test_a_class_is_drawn_with_a_seed_an_image(client):
    first = client.predict("7", 2, 5, 1.8, 0.0, 0.7, 4, api_name="/generate")
    assert [image["caption"] for image in first] == ["7, seed 5", "7, seed 6"]
    again = client.predict("7", 1, 6, 1.8, 0.0, 0.7, 4, api_name="/generate")

    def content(image):
        with open(image["image"], "rb") as file:
            return file.read()

    assert content(again[0]) == content(first[1])  # the seed makes the picture, not the batch


def test_an_unknown_class_is_a_clear_error(client):
    with pytest.raises(Exception, match="did you mean"):
        client.predict("seven", 1, 0, 1.8, 0.0, 0.7, 4, api_name="/generate")
